"""Run README's programs one after another with whatever pyro_lift is installed: ``make try-wheel`` does, on a wheel."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def main() -> None:
    """Run the programs of the file that is named."""
    text = Path(sys.argv[1]).read_text("utf-8")
    names: dict[str, object] = {"__name__": "__main__"}
    for number, program in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL), start=1):
        exec(compile(program, f"{sys.argv[1]}, program {number}", "exec"), names)
    import pyro_lift

    print(f"README's programs ran with {Path(str(pyro_lift.__file__)).parent}")


if __name__ == "__main__":
    main()

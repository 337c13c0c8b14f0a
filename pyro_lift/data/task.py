"""Tasks under the name of the module that once held them all: see ``models.task``, ``data.text``, ``data.images``."""

from pyro_lift.data.images import Images, ImageTask
from pyro_lift.data.text import TextForm, TextRow, TextTask, check_answer
from pyro_lift.models.task import Rows, Task, as_rows

__all__ = ["ImageTask", "Images", "Rows", "Task", "TextForm", "TextRow", "TextTask", "as_rows", "check_answer"]

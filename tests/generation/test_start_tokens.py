"""The token that answers begin with: one that is none, and another one than the network's."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from text_backbones import ROWS, written
from text_tokenizers import tokenizer

from pyro_lift.data.encode import TextToText
from pyro_lift.data.text import TextTask
from pyro_lift.models.door import check_rows


def test_a_start_token_that_is_none_is_refused() -> None:
    for wrong in (None, "2", 1.0, True):
        with pytest.raises(TypeError, match=r"start_token=.*decoder_start_token_id"):
            TextToText(tokenizer("seq2seq"), start_token=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="start_token=-1"):
        TextToText(tokenizer("seq2seq"), start_token=-1)
    assert TextToText(tokenizer("seq2seq"), start_token=np.int64(2)).start_token == 2  # type: ignore[arg-type]


def test_a_start_token_of_another_network_is_warned_of_once_for_all_tasks(caplog: pytest.LogCaptureFixture) -> None:
    network = written("bart")
    own = network.backbone.config.decoder_start_token_id
    for start, differs in ((own, False), (own + 1, True)):
        caplog.clear()
        encode = TextToText(tokenizer("seq2seq"), start_token=start)
        check_rows(network.posterior.adapter, [encode(TextTask(name, ROWS)) for name in ("a", "b")])
        said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        assert len(said) == differs
        if differs:
            assert (
                f"tasks 'a', 'b': answers begin with the token {start}" in said[0] and f"start_token={own}" in said[0]
            )

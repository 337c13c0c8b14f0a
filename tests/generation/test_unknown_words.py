"""Tokens that a network has no word for are refused where it writes, scores and predicts, with their row."""

from __future__ import annotations

import pytest
import torch
from text_backbones import WRITERS, written


@pytest.mark.parametrize("name", WRITERS)
def test_texts_to_write_from_and_to_score_are_looked_at(name: str) -> None:
    posterior = written(name, draws=1).posterior
    known = torch.full((3, 4), 7)
    odd = known.clone()
    odd[1, 2] = 24
    below = known.clone()
    below[1, 2] = -1
    for inputs, token in ((odd, 24), (below, -1)):
        said = rf"'input_ids': token {token} in row 1; the network has 24 word embeddings"
        with pytest.raises(ValueError, match=f"inputs, {said}"):
            posterior.generate(inputs, max_new_tokens=2)
        with pytest.raises(ValueError, match=f"inputs, {said}"):
            posterior.score(inputs, known)
        with pytest.raises(ValueError, match=rf"outputs: token {token} in row 1; the network has 24"):
            posterior.score(known, inputs)
    named = {key: x.clone() for key, x in posterior.task.train.inputs.items()}
    last = "decoder_input_ids" if "decoder_input_ids" in named else "input_ids"
    named[last][1, 2] = 24
    with pytest.raises(ValueError, match=rf"inputs, '{last}': token 24 in row 1; the network has 24"):
        posterior.predict(named)

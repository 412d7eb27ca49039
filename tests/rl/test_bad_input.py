"""What cannot work is refused before anything starts, by the key and with the fix. (Recordings: test_replay.py.)"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from memento.errors import UserError
from memento.preflight import check_reference, check_run
from memento.tiny import write_tiny_model


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"sampling": {"top_p": 0.95}}, "top_p must be 1 and top_k -1"),
        ({"sampling": {"top_k": 20}}, "top_p must be 1 and top_k -1"),
        ({"groups_per_step": 5, "learner": {"minibatches": 2}}, r"groups_per_step \(5\) must be a multiple of learner"),
        ({"learner": {"zero_stage": 0, "dtype": "float32", "offload_optimizer": True}}, "needs zero_stage 1, 2 or 3"),
        ({"learner": {"zero_stage": 2, "offload_parameters": True}}, "offload_parameters needs zero_stage 3"),
        ({"reference": "somewhere"}, "reference is read by a KL penalty"),
        ({"profile_steps": [3, 2]}, "the first comes first"),
        ({"profile_steps": [0, 2]}, "steps count from 1"),
        ({"learner": {"lora": {"rank": 0}}}, "greater than 0"),
        ({"learner": {"lr": -1}}, "greater than or equal to 0"),
    ],
)
def test_contradictions_in_a_config(make, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make("config", **sections)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "policy", seed=0)


def test_a_reference_with_another_vocabulary(make, model: Path, tmp_path: Path) -> None:
    check_reference(model, model)
    other = shutil.copytree(model, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    first, second = (token for token, index in vocabulary.items() if index in (300, 301))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    config = make(
        "config",
        model=str(model),
        reference=str(other),
        algorithm={"kl_coef": 0.1},
        sampling={"max_tokens": 64},
        rollout={"device": "cpu"},
        learner={"device": "cpu"},
    )
    with pytest.raises(UserError, match=r"reference: .*other has another vocabulary than .*policy \(\d+ tokens"):
        check_run(config)

    larger = shutil.copytree(model, tmp_path / "larger")
    rows = json.loads((larger / "config.json").read_text(encoding="utf-8"))
    (larger / "config.json").write_text(json.dumps(rows | {"vocab_size": 512}), encoding="utf-8")
    with pytest.raises(UserError, match=r"larger has vocab_size 512, .* has \d+; they must agree"):
        check_reference(larger, model)
    with pytest.raises(UserError, match="there is no folder"):
        check_reference(tmp_path / "absent", model)

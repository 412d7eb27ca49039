"""The command line: help, exit codes, and one readable paragraph for whatever a user can get wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import memento
from memento import cli
from memento.problems import Problem, ProblemKind, save_problems
from memento.trajectory import FinishReason, ScoredGroup, Trajectory, VersionSpan, append_jsonl

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "rl" / "quickstart.yaml")
COMMANDS = sorted(
    command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback
)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line."""
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(argument) for argument in arguments])
        raise SystemExit(0)
    output = capsys.readouterr()
    return int(exit_.value.code or 0), output.out, output.err


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one paragraph of a refused command."""
    code, out, err = run(capsys, *arguments)
    assert code == 2, (out, err)
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


def test_all_commands_are_there() -> None:
    wanted = {"quickstart", "sft", "rl", "evaluate", "generate", "score", "view", "export", "serve", "show", "doctor"}
    wanted |= {"reference", "report", "compare", "push"}
    assert wanted <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = run(capsys, command, "--help")
    assert code == 0 and f"Example: memento {command}" in " ".join(out.split())


def test_version_and_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version")[:2] == (0, memento.__version__ + "\n")
    assert run(capsys, "no-such-command")[0] == 2
    assert run(capsys, "evaluate")[0] == 2


def test_show_prints_the_tree_and_the_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = {"model_type": "qwen3", "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"head_dim": 32, "hidden_size": 64, "intermediate_size": 256, "vocab_size": 347}
    (tmp_path / "config.json").write_text(json.dumps({**model, **sizes}))
    code, out, _ = run(capsys, "show", CONFIG, "rollout.engines=3", f"model={tmp_path}", "rollout.dtype=float32")
    assert code == 0
    tree, plan = out.split("Actors:")
    assert yaml.safe_load(tree)["rollout"]["engines"] == 3
    assert "3 × engine" in plan and f"{2 * 4 * 2 * 32 * 4:,} bytes a token" in plan


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "nowhere.yaml"], "no config file at nowhere.yaml"),
        (["show", CONFIG, "learner.lrr=1"], "did you mean `learner.lr`"),
        (["evaluate", "m", "--problems", "nowhere.jsonl"], "no problem file at nowhere.jsonl"),
        (["score", "nowhere.jsonl", "--problems", "nowhere.jsonl"], "no problem file"),
        (["evaluate", "m", "--problems", "p.jsonl", "--restart", "--no-evict"], "choose one of the two"),
        (["view", "nowhere.jsonl"], "nowhere.jsonl"),
        (["export", "nowhere", "--out", "x"], "nowhere is no run folder"),
        (["generate", "m", "--problems", CONFIG, "--out", "x"], "line 1: not JSON"),
        (["quickstart", "--size", "huge"], "--size"),
        (["show", CONFIG, "--like", "Qwen/Qwen3-8"], "did you mean Qwen/Qwen3-8B?"),
        (["show", CONFIG, "--gpu", "H1000"], "did you mean H100?"),
        (["doctor", "nowhere.yaml"], "no config file at nowhere.yaml"),
        (["reference", "everything"], "there are config, metrics, picture"),
        (["report", "nowhere"], "nowhere is no folder"),
        (["compare", "nowhere"], "two run folders or more"),
        (["compare", "nowhere", "elsewhere"], "nowhere is no run folder"),
        (["push", "nowhere", "--to", "a/b"], "nowhere is no model folder"),
        (["push", "nowhere", "--to", "just-a-name"], "no hub repository (organisation/name)"),
    ],
)
def test_bad_input_is_one_paragraph(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert message in refused(capsys, *arguments)


def test_training_commands_refuse_before_anything_starts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert "lrr" in refused(capsys, "rl", CONFIG, "learner.lrr=1", f"out={out}")
    assert "there is no folder" in refused(capsys, "rl", CONFIG, "model=/no/such/model", f"out={out}")
    sft = next((ROOT / "configs" / "sft").glob("*.yaml"))
    assert "memento sft" in refused(capsys, "rl", sft, f"out={out}")
    assert not out.exists()


def trajectory(problem_id: str, text: str, index: int) -> Trajectory:
    return Trajectory(
        problem_id=problem_id,
        group_id=f"0/{problem_id}",
        sample_index=index,
        prompt_ids=(1,),
        completion_ids=(2,),
        rollout_logprobs=(-0.5,),
        text=text,
        finish_reason=FinishReason.STOP,
        weight_versions=(VersionSpan(0, 1, 0),),
        peak_kv_tokens=2,
        peak_kv_pages=1,
        kv_area_tokens=2,
        seed=0,
        temperature=1.0,
        seconds=0.1,
    )


def test_score_recorded_completions(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    problems, recorded, out = tmp_path / "p.jsonl", tmp_path / "t.jsonl", tmp_path / "scored.jsonl"
    save_problems([Problem(id="a", kind=ProblemKind.MATH, prompt="1 + 1?", answer="2")], problems)
    texts = [r"It is \boxed{2}.", r"It is \boxed{3}.", r"So \boxed{\frac{4}{2}}"]
    append_jsonl([trajectory("a", text, i) for i, text in enumerate(texts)], recorded)
    code, printed, _ = run(capsys, "score", recorded, "--problems", problems, "--out", out)
    assert code == 0 and "3 completions of 1 groups: mean score 0.6667" in printed
    assert ScoredGroup.model_validate_json(out.read_text()).scores == (1.0, 0.0, 1.0)
    assert "not overwritten" in refused(capsys, "score", recorded, "--problems", problems, "--out", out)
    append_jsonl([trajectory("b", "?", 0)], recorded)
    assert "'b'" in refused(capsys, "score", recorded, "--problems", problems)


def test_doctor_reports_and_fails_only_for_problems(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from memento import doctor

    checks = [doctor.Check("cores", "warning", "2", "get more")]
    monkeypatch.setattr(doctor, "diagnose", lambda config: checks)
    code, out, _ = run(capsys, "doctor")
    assert code == 0 and "get more" in out
    checks.append(doctor.Check("vLLM", "problem", "missing", "install it"))
    code, out, _ = run(capsys, "doctor")
    assert code == 1 and "install it" in out


FULL = """
mount -t tmpfs -o size=8k none "$1" || exit 77
echo '{"step": 1, "reward/mean": 0.5}' > "$1/metrics.jsonl"
"$2" -m memento.cli report "$1"
code=$?
ls -A "$1"
exit $code
"""


def test_a_disk_that_is_really_full_leaves_no_half_file(tmp_path: Path) -> None:
    apart = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces here")
    command = [*apart, "sh", "-c", FULL, "sh", str(tmp_path), sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("no file system can be mounted here")
    assert done.returncode == 1 and done.stdout.split() == ["metrics.jsonl"], done.stdout + done.stderr
    assert "the disk is full" in done.stderr and "report.html" in done.stderr and done.stderr.count("\n") == 1

"""The result of a quickstart: one record, the table for people, ``results.json`` for programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError

from memento.errors import UserError
from memento.problems import Record, explain
from memento.run import read_metrics, replace_text

if TYPE_CHECKING:
    from rich.console import Group

Row = Literal["stage1_full", "stage1_evicted", "stage2_evicted", "rl_evicted", "control_full"]
Temperature = Literal["1.0", "0.6", "greedy"]


@dataclass(frozen=True, slots=True)
class Model:
    """What a row of the result table is of.

    Attributes:
        label: for people.
        folder: below the quickstart's: its ``hf`` is evaluated.
        evict: how it is decoded.
    """

    label: str
    folder: str
    evict: bool


ROWS: dict[Row, Model] = {
    "stage1_full": Model("SFT stage 1, full attention", "stage1", evict=False),
    "stage1_evicted": Model("SFT stage 1, under eviction", "stage1", evict=True),
    "stage2_evicted": Model("SFT stage 2, under eviction", "stage2", evict=True),
    "rl_evicted": Model("after RL, under eviction", "rl", evict=True),
    "control_full": Model("SFT-only control, full attention", "control", evict=False),
}
"""The rows of the result table."""

TEMPERATURES: dict[Temperature, str] = {"1.0": "temperature 1", "0.6": "temperature 0.6", "greedy": "greedy"}
"""Its columns, as they are called."""


def sampling_temperature(name: Temperature) -> float:
    """The temperature of a column."""
    return 0.0 if name == "greedy" else float(name)


MISMATCH_KEY = "mismatch/kl_mean"
"""The metric of a training step behind `MismatchKL`."""


class Accuracies(Record):
    """Accuracy of each model on the held-out problems at temperature 1, in [0, 1]."""

    stage1_full: float = Field(ge=0, le=1)
    stage1_evicted: float = Field(ge=0, le=1)
    stage2_evicted: float = Field(ge=0, le=1)
    rl_evicted: float = Field(ge=0, le=1)
    control_full: float = Field(ge=0, le=1)


class KVRatios(BaseModel):
    """Resident KV of the same tokens without eviction over with eviction.

    ``peak_ratio``: of the mean peaks. ``area_ratio``: of the mean KV-AUC. `peak_tokens` and `peak_tokens_full` are the
    mean peaks themselves.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    peak_ratio: float = Field(gt=0)
    area_ratio: float = Field(gt=0)
    peak_tokens: float | None = None
    peak_tokens_full: float | None = None


class MismatchKL(Record):
    """KL between the engine's and the learner's log-probabilities over the run: mean over steps, and the worst step."""

    mean: float
    max: float


class QuickstartResults(Record):
    """Everything the quickstart measured.

    Attributes:
        accuracy: at temperature 1.
        accuracy_by_temperature: row of `ROWS` -> temperature -> accuracy; a row may lack a temperature.
        stderr_by_temperature: standard error over problems of each of them.
        seconds: one key a phase, and ``total``: the wall time of all, which is less where phases overlap.
        problems: held-out problems behind each accuracy at temperature 1.
        cool_problems: held-out problems behind each accuracy at temperature 0.6 and greedy.
    """

    accuracy: Accuracies
    accuracy_by_temperature: dict[Row, dict[Temperature, float]] = Field(default_factory=dict)
    stderr_by_temperature: dict[Row, dict[Temperature, float]] = Field(default_factory=dict)
    kv: KVRatios
    mismatch_kl: MismatchKL
    seconds: dict[str, float]
    problems: int = Field(gt=0)
    cool_problems: int | None = None
    seed: int

    @classmethod
    def read(cls, folder: str | Path, *, seed: int) -> QuickstartResults:
        """Collect the results from the files of a quickstart folder: nothing is measured here.

        They are ``eval/<row>_t<temperature>.json`` (accuracy, KV), ``rl/metrics.jsonl`` (mismatch KL) and
        ``phases.json`` (seconds).

        Raises:
            UserError: naming the file that is missing or not readable.
        """
        folder = Path(folder)
        found: dict[Row, dict[Temperature, _Evaluation]] = {row: {} for row in ROWS}
        for row in ROWS:
            for temperature in TEMPERATURES:
                file = folder / "eval" / f"{row}_t{temperature}.json"
                if file.is_file() or temperature == "1.0":  # only temperature 1 has to be there
                    found[row][temperature] = _read(file, _Evaluation)
        kl = [value for line in read_metrics(folder / "rl") if (value := line.get(MISMATCH_KEY)) is not None]
        if not kl:
            raise UserError(f"{folder / 'rl' / 'metrics.jsonl'} has no {MISMATCH_KEY}; did the RL run take a step?")
        after_rl = found["rl_evicted"]["1.0"]
        cool = [e.problems for of in found.values() for t, e in of.items() if t != "1.0"]
        return cls(
            accuracy=Accuracies.model_validate({row: of["1.0"].accuracy.mean for row, of in found.items()}),
            accuracy_by_temperature={row: {t: e.accuracy.mean for t, e in of.items()} for row, of in found.items()},
            stderr_by_temperature={
                row: {t: e.accuracy.stderr for t, e in of.items() if e.accuracy.stderr is not None}
                for row, of in found.items()
            },
            kv=after_rl.kv,
            mismatch_kl=MismatchKL(mean=sum(kl) / len(kl), max=max(kl)),
            seconds=dict(_read(folder / "phases.json", _Seconds).root),
            problems=after_rl.problems,
            cool_problems=min(cool) if cool else None,
            seed=seed,
        )

    def cell(self, row: Row, temperature: Temperature) -> tuple[float, float | None] | None:
        """Accuracy and standard error in one cell of the table, None where it was not measured."""
        accuracy = self.accuracy_by_temperature.get(row, {}).get(temperature)
        if temperature == "1.0":
            accuracy = float(getattr(self.accuracy, row))
        if accuracy is None:
            return None
        return accuracy, self.stderr_by_temperature.get(row, {}).get(temperature)


class _Loose(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _Estimate(_Loose):
    mean: float
    stderr: float | None = None


class _Evaluation(_Loose):
    """The part of `memento.rl.evaluate.EvalResult` that the table shows."""

    accuracy: _Estimate
    kv: KVRatios
    problems: int


class _Seconds(RootModel[dict[str, float]]):
    """``phases.json``."""


_Model = TypeVar("_Model", bound=BaseModel)


def _read(path: Path, schema: type[_Model]) -> _Model:
    if not path.is_file():
        raise UserError(f"there is no {path}: the quickstart that should have written it did not finish. Use --resume.")
    try:
        return schema.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise UserError(f"{path} is not what the quickstart writes: {explain(error)}.") from error


def write_results(results: QuickstartResults, path: str | Path) -> None:
    """Write ``results.json``."""
    replace_text(Path(path), results.model_dump_json(indent=2, exclude_none=True) + "\n")


def read_results(path: str | Path) -> QuickstartResults:
    """Read ``results.json`` back.

    Raises:
        UserError: no such file, or it is not one of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no results at {path}; `memento quickstart` writes them.")
    try:
        return QuickstartResults.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise UserError(f"{path} does not hold quickstart results: {explain(error)}.") from error


def result_table(results: QuickstartResults) -> Group:
    """The result for the terminal: accuracy of every model at every temperature, then KV, mismatch and seconds."""
    from rich.console import Group
    from rich.table import Table

    accuracy = Table(title=caption(results))
    accuracy.add_column("model")
    for name in TEMPERATURES.values():
        accuracy.add_column(name, justify="right")
    for row, model in ROWS.items():
        cells = [percent(results.cell(row, temperature)) for temperature in TEMPERATURES]
        accuracy.add_row(model.label, *cells, style="bold" if row == "rl_evicted" else "")
    cost = Table(show_header=False)
    cost.add_column("measure")
    cost.add_column("value", justify="right")
    for label, value in costs(results):
        cost.add_row(label, value)
    return Group(accuracy, cost)


def caption(results: QuickstartResults) -> str:
    """What the accuracies are of."""
    cool = results.cool_problems
    fewer = f" (the first {cool} at 0.6 and greedy)" if cool is not None and cool != results.problems else ""
    return f"Accuracy in % on {results.problems} held-out problems{fewer}, ± standard error"


def percent(cell: tuple[float, float | None] | None) -> str:
    """A cell of the table in percent: ``92.3 ± 1.3``, or a dash for what was not measured."""
    if cell is None:
        return "–"
    accuracy, stderr = cell
    return f"{100 * accuracy:.1f}" + ("" if stderr is None else f" ± {100 * stderr:.1f}")


def costs(results: QuickstartResults) -> list[tuple[str, str]]:
    """KV, mismatch and seconds of every phase, as label and value."""
    kv, kl = results.kv, results.mismatch_kl
    peaks = ""
    if kv.peak_tokens is not None and kv.peak_tokens_full is not None:
        peaks = f" ({kv.peak_tokens_full:.0f} → {kv.peak_tokens:.0f} tokens)"
    rows = [
        ("peak KV, same tokens", f"{kv.peak_ratio:.2f}× lower{peaks}"),
        ("KV-AUC, same tokens", f"{kv.area_ratio:.2f}× lower"),
        ("mismatch KL, mean / worst step", f"{kl.mean:.1e} / {kl.max:.1e}"),
    ]
    phases = [(name, s) for name, s in results.seconds.items() if name != "total"]
    rows += [(f"seconds, {name.replace('_', ' ')}", f"{s:.0f}") for name, s in phases]
    if "total" in results.seconds:
        rows.append(("seconds, total", f"{results.seconds['total']:.0f}"))
    return rows

"""Weight files: what is read is what was written, or an error."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from memento.rollout.weights import (
    WeightsCorrupt,
    WeightUpdate,
    file_checksum,
    read_weights,
    shared_memory_folder,
    verify_weights,
    write_weights,
)

TENSORS = {"a.weight": torch.randn(7, 5), "b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T}


def test_round_trip_keeps_names_types_and_bits(tmp_path: Path):
    update = write_weights(TENSORS, tmp_path, 3)
    assert (update.version, update.bytes) == (3, update.path.stat().st_size)
    verify_weights(update)
    loaded = read_weights(pickle.loads(pickle.dumps(update)))
    assert loaded.keys() == TENSORS.keys()
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )
    assert WeightUpdate.model_validate(update.model_dump(mode="json")) == update


def test_only_the_version_before_is_kept_and_nothing_half_written(tmp_path: Path):
    for version in (1, 2, 3, 10):
        write_weights(iter(TENSORS.items()), tmp_path, version)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "weights-00000003.safetensors",
        "weights-00000010.safetensors",
    ]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "bytes"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "checksum"),
        (None, "no file"),
    ],
)
def test_a_damaged_file_is_never_loaded(tmp_path: Path, damage, message):
    update = write_weights(TENSORS, tmp_path, 1)
    data = update.path.read_bytes()
    update.path.unlink()
    if damage is not None:
        update.path.write_bytes(damage(data))
    with pytest.raises(WeightsCorrupt, match=message):
        verify_weights(update)
    if message != "checksum":  # which is read once, before a load
        with pytest.raises(WeightsCorrupt, match=message):
            read_weights(update)


def test_an_old_file_is_written_over_whatever_its_size(tmp_path: Path):
    for version, size in enumerate((3000, 2000, 10, 5000, 4000)):
        tensors = {f"w{i}": torch.randn(size) for i in range(3)}
        update = write_weights(tensors, tmp_path, version)
        verify_weights(update)
        assert update.bytes == update.path.stat().st_size
        loaded = read_weights(update)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_stream_of_tensors_is_written_as_it_comes_and_any_reader_understands_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from safetensors.torch import load_file

    tensors = {f"layer.{i}": torch.randn(i, 3) for i in range(40)} | {
        "scalar": torch.tensor(3.5, dtype=torch.float16),
        "empty": torch.empty(0, 4),
        "flags": torch.tensor([True, False, True]),
        "view": torch.arange(12).reshape(3, 4).T[1:],
    }
    alive = 0

    def gathered():
        nonlocal alive
        for name, tensor in tensors.items():
            alive += 1
            yield name, tensor.clone()
            alive -= 1
            assert alive == 0

    for header_bytes in (4096, 64):  # the header fits into its gap, or the data has to move
        monkeypatch.setattr("memento.rollout.weights._HEADER_BYTES", header_bytes)
        monkeypatch.setattr("memento.rollout.weights._PIECE_BYTES", 1000)
        update = write_weights(gathered(), tmp_path, header_bytes)
        verify_weights(update)
        loaded = load_file(update.path)
        assert loaded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name


def test_the_checksum_covers_every_piece_and_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("memento.rollout.weights._PIECE_BYTES", 4)
    file = tmp_path / "file"
    sums = set()
    for content in (b"aaaabbbbc", b"bbbbaaaac", b"aaaabbbbd", b"aaaabbbb", b""):
        file.write_bytes(content)
        sums.add(file_checksum(file))
    assert len(sums) == 5


def test_the_shared_folder_is_private_and_new():
    folder = shared_memory_folder()
    try:
        assert folder.stat().st_mode & 0o077 == 0
        assert not list(folder.iterdir())
    finally:
        folder.rmdir()

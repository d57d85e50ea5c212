"""The folder of an unfinished compilation: what survives a kill, and what is refused."""

from __future__ import annotations

import errno
import subprocess
import sys
import textwrap

import pytest
import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.workspace import Workspace, writing

CONFIG = {"method": "hqq", "bits": 4}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "low": torch.randint(0, 99, (3, 5), generator=generator),
        "scales": torch.rand(2, generator=generator),
    }


def open_workspace(tmp_path, config=CONFIG, *, resume=False, overwrite=False) -> Workspace:
    return Workspace(tmp_path / "out", config, resume=resume, overwrite=overwrite)


def test_finished_layers_are_there_after_a_restart(tmp_path):
    with open_workspace(tmp_path) as first:
        first.store("a.q_proj", tensors(1), {"relative_error": 0.5})
        first.store("a.k_proj", tensors(2), {"relative_error": 0.25})
    with open_workspace(tmp_path, resume=True) as second:
        assert second.finished("a.q_proj") == {"relative_error": 0.5}
        assert second.finished("a.v_proj") is None
        for name, value in tensors(2).items():
            assert torch.equal(second.load("a.k_proj")[name], value)


def test_a_torn_journal_line_and_a_damaged_part_are_done_again(tmp_path):
    with open_workspace(tmp_path) as workspace:
        for index, layer in enumerate("abc"):
            workspace.store(layer, tensors(index), {})
    folder = tmp_path / "out.resume"
    part = folder / "00001.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"\x7f")
    with (folder / "journal.jsonl").open("a") as journal:
        journal.write('{"layer": "d", "fi')
    with open_workspace(tmp_path, resume=True) as workspace:
        assert workspace.finished("a") == {}
        assert workspace.finished("b") is None  # damaged
        assert workspace.finished("c") is None  # after a damaged one: order is part of the result
        workspace.store("b", tensors(7), {})
        assert torch.equal(workspace.load("b")["low"], tensors(7)["low"])


def test_fault_22_another_configuration_is_refused_by_name(tmp_path):
    with open_workspace(tmp_path):
        pass
    with (
        pytest.raises(InvalidInputError, match=r"bits: 4 there, 3 now"),
        open_workspace(tmp_path, {**CONFIG, "bits": 3}, resume=True),
    ):
        pass


def test_an_unfinished_run_is_not_thrown_away_unasked(tmp_path):
    with open_workspace(tmp_path) as workspace:
        workspace.store("a", tensors(0), {})
    with pytest.raises(InvalidInputError, match="--resume"), open_workspace(tmp_path):
        pass
    with open_workspace(tmp_path, overwrite=True) as workspace:
        assert workspace.finished("a") is None


def test_a_foreign_folder_is_not_taken_for_an_unfinished_run(tmp_path):
    (tmp_path / "out.resume").mkdir()
    (tmp_path / "out.resume" / "thesis.tex").write_text("x")
    with pytest.raises(InvalidInputError, match="not an unfinished compilation"), open_workspace(tmp_path):
        pass
    assert (tmp_path / "out.resume" / "thesis.tex").exists()


def test_fault_28_a_second_writer_is_refused_while_the_first_lives(tmp_path):
    code = f"""
        from pathlib import Path
        from qcompiler.kernels.errors import InvalidInputError
        from qcompiler.workspace import Workspace
        try:
            with Workspace(Path({str(tmp_path / "out")!r}), {CONFIG!r}, resume=True, overwrite=False):
                print("entered")
        except InvalidInputError as error:
            print(error.message)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with open_workspace(tmp_path):
        held = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    free = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "another process is compiling" in held.stdout
    assert free.stdout == "entered\n"


@pytest.mark.parametrize(
    ("code", "told"),
    [(errno.ENOSPC, "disk is full"), (errno.EROFS, "cannot be written"), (errno.EACCES, "-o")],
)
def test_fault_20_a_full_or_read_only_disk_is_told_as_such(tmp_path, code, told):
    with pytest.raises(InvalidInputError, match=told), writing(tmp_path):
        raise OSError(code, "as the kernel says it")


def test_discard_leaves_nothing_behind(tmp_path):
    with open_workspace(tmp_path) as workspace:
        workspace.store("a", tensors(0), {})
        workspace.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_failed_before_its_first_layer_leaves_nothing(tmp_path):
    with pytest.raises(InvalidInputError, match="no such thing"), open_workspace(tmp_path):
        raise InvalidInputError("no such thing")
    assert list(tmp_path.iterdir()) == []

"""The check of a machine, on this one."""

import pytest
import torch

import disback
from runtime import check

# A stage, as a process of its own, without its figures.
STAGE = """
import sys
import backtrack, degrade
from toy2d import figures
figures.draw = lambda *args: None
{"degrade.py": degrade, "backtrack.py": backtrack}[sys.argv[1]].main(sys.argv[2:])
"""


def test_the_table_of_a_machine_that_is_sound(capsys, monkeypatch):
    stage = check.stage
    monkeypatch.setattr(check, "stage", lambda *argv: stage("-c", STAGE, *argv))
    with pytest.raises(SystemExit) as ended:
        check.main(["toy2d", "--steps", "8"])
    first, head, *rows = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0 and torch.__version__ in first and head.startswith("problem")
    assert len(rows) == (7 if torch.cuda.is_available() else 5)
    assert all(row.startswith("toy2d") and row.endswith(" ok") for row in rows)


def test_a_loss_that_is_not_the_cpus_and_a_stage_that_ends_badly_fall_short(capsys, monkeypatch):
    losses = check.losses

    def other(name, inputs, device, *rest, **flags):
        return losses(name, inputs, device) * (1.001 if device != "cpu" else 1)

    monkeypatch.setattr(check, "losses", other)
    monkeypatch.setattr(check, "stage", lambda *argv: "error: out of luck")
    with pytest.raises(SystemExit) as ended:
        check.main(["toy2d"])
    said = capsys.readouterr().out
    assert ended.value.code == 1
    assert "against a CPU's" in said and "0.001" in said and said.count("FAILED") == 3
    assert "FAILED error: out of luck" in said


@pytest.mark.parametrize("name", check.PROBLEMS)
def test_the_losses_do_not_vanish_and_see_a_weight_that_changes(name, monkeypatch):
    inputs = check.draw(name)
    found = check.losses(name, inputs, "cpu")
    assert found.isfinite().all() and (found > 1e-3).all()
    other = check.losses(name, (1.001 * inputs[0], *inputs[1:]), "cpu")
    assert check.apart(other, found) > 1e-5


@pytest.mark.parametrize("argv, cause", [(["toy3d"], "toy3d"), (["--steps", "1"], "--steps")])
def test_a_mistake_is_refused(argv, cause):
    with pytest.raises(disback.Refusal, match=cause):
        check.main(argv)

"""Recording a path, loading it strictly, and walking back along it."""

import json
import math

import pytest
import torch
from conftest import refusal
from safetensors.torch import load_file
from torch import nn

import degrade
import disback
from runtime import files


class Shift(nn.Module):
    """D(x) = x + shift, a network whose place in function space is one number."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(float(shift)))

    def forward(self, x, sigma, cond=None):
        return x + self.shift


SAMPLES = [(torch.zeros(4, 2), torch.full((4, 1), 0.5), None)]


def record(folder, nodes=4, steps=20, spacing="linear", place=float, **about):
    net = Shift()
    recorder = degrade.Recorder(folder, net, nodes, steps, SAMPLES, spacing)
    for step in range(1, steps + 1):
        with torch.no_grad():
            net.shift.fill_(place(step))
        recorder.offer(net, step)
    return recorder.close(**about), net


def test_a_path_that_is_recorded_again_meanwhile_is_not_walked_on(tmp_path):
    path, _ = record(tmp_path / "a")
    walk = disback.PathScheduler(path, Shift(), interval=1)
    for file in (tmp_path / "a").iterdir():
        file.unlink()
    record(tmp_path / "a", place=lambda n: 2.0 * n)
    assert "another path meanwhile" in refusal(walk.step)


def test_a_path_is_never_recorded_over_another(tmp_path):
    record(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert "holds a path already" in refusal(record, tmp_path, 4, 20, "linear", lambda n: 2.0 * n)
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}  # at once


def test_node_0_is_the_teacher_as_it_was_given_not_as_its_first_call_leaves_it(tmp_path):
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x, sigma, cond=None):
            return self.norm(x)  # which moves the running mean

    net = Normed()
    given = {name: weight.clone() for name, weight in net.state_dict().items()}
    degrade.Recorder(tmp_path, net, 1, 1, [(torch.ones(4, 2), torch.ones(4, 1), None)])
    node = load_file(tmp_path / "step-0.safetensors")
    assert all(torch.equal(node[name], weight) for name, weight in given.items())


class Twins(nn.Module):
    """Two convolutions, which may have one weight."""

    def __init__(self, tied):
        super().__init__()
        self.first, self.second = (nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(2))
        if tied:
            self.second.weight = self.first.weight

    def forward(self, x, sigma, cond=None):
        return self.second(self.first(x))


@pytest.mark.parametrize("tied, layout", [
    (True, torch.contiguous_format), (False, torch.channels_last)])
@pytest.mark.parametrize("write", [None, files.save_tensors])
def test_a_teacher_in_channels_last_or_with_tied_weights_is_recorded_and_loaded(
        tmp_path, tied, layout, write):
    net, other = (Twins(tied).to(memory_format=layout) for _ in range(2))
    samples = [(torch.ones(2, 3, 4, 4), torch.ones(1), None)]
    recorder = degrade.Recorder(tmp_path, net, 1, 1, samples, write=write)
    with torch.no_grad():
        net.first.weight += 1
    recorder.offer(net, 1)
    recorder.close().load(1, other)
    assert torch.equal(other.first.weight, net.first.weight)
    assert torch.equal(other.second.weight, net.second.weight)


def test_a_spacing_that_there_is_not_is_no_other_one(tmp_path):
    with pytest.raises(AssertionError, match="linar"):
        record(tmp_path, spacing="linar")


def test_a_path_that_lacks_a_node_is_not_closed(tmp_path):
    def place(step):
        (tmp_path / f"step-{step - 10}.safetensors").unlink(missing_ok=True)
        return step

    with pytest.raises(FileNotFoundError, match="step-0"):
        record(tmp_path, place=place)
    assert not (tmp_path / "path.json").exists()


def test_the_target_visits_every_node_once_in_order_and_stays_with_the_teacher(tmp_path):
    path, _ = record(tmp_path)
    target = Shift()
    walk, visits = disback.PathScheduler(path, target, interval=3), []
    for _ in range(20):
        visits.append(walk.node)
        walk.step()
    assert visits == [3] * 3 + [2] * 3 + [1] * 3 + [0] * 11


def test_after_every_switch_the_targets_weights_are_the_nodes_and_its_answers_change(tmp_path):
    path, _ = record(tmp_path)
    target = Shift()
    walk = disback.PathScheduler(path, target, interval=1)
    answers = []
    while True:
        expected = load_file(tmp_path / f"{walk.node:02d}.safetensors")["shift"]
        assert torch.equal(target.shift, expected)
        answers.append(target(*SAMPLES[0])[0, 0].item())
        if not walk.step():
            break
    assert answers == [15.0, 10.0, 5.0, 0.0]  # steps 15, 10 and 5, then the teacher
    assert walk.node == 0


def test_node_zero_is_the_teacher_and_nodes_do_not_alias_the_network_that_moves_on(tmp_path):
    path, net = record(tmp_path)
    with torch.no_grad():
        net.shift.fill_(99.0)
    found = [load_file(file)["shift"].item() for file in path.files]
    assert found == [0.0, 5.0, 10.0, 15.0, 20.0]
    assert path.about["steps"] == [0, 5, 10, 15, 20]


def test_switching_keeps_the_targets_own_storage(tmp_path):
    """A compiled target must not see new tensors, nor memory a second copy. The old tensor is held
    here, so that no other can be given its address."""
    path, _ = record(tmp_path)
    target = Shift()
    shift, where = target.shift, target.shift.data_ptr()
    walk = disback.PathScheduler(path, target, interval=1)
    walk.step()
    assert target.shift is shift and shift.data_ptr() == where


def test_without_a_path_the_walk_is_plain_vsd():
    walk = disback.PathScheduler(None, Shift(7.0), interval=1)
    assert [walk.step() for _ in range(3)] == [False] * 3
    assert walk.node == 0 and walk.target.shift.item() == 7.0


def test_arc_spacing_divides_the_distance_where_the_network_moves_fast_then_slowly(tmp_path):
    path, _ = record(tmp_path, nodes=5, steps=100, spacing="arc",
                     place=lambda step: 1 - math.exp(-step / 10))
    gaps = torch.tensor(path.about["positions"]).diff()
    assert len(gaps) == 5 and gaps.max() < 2 * gaps.mean() and gaps.min() > 0.3 * gaps.mean()
    linear, _ = record(tmp_path / "linear", nodes=5, steps=100, spacing="linear",
                       place=lambda step: 1 - math.exp(-step / 10))
    assert torch.tensor(linear.about["positions"]).diff().max() > 4 * gaps.mean()


@pytest.mark.parametrize("spacing", ["linear", "log"])
@pytest.mark.parametrize("nodes, steps", [
    (1, 1), (1, 9), (7, 7), (10, 100), (50, 60), (3, 1000), (10, 58)])
def test_nodes_lie_at_distinct_steps_that_rise_and_end_at_the_last(tmp_path, spacing, nodes, steps):
    recorder = degrade.Recorder(tmp_path, Shift(), nodes, steps, SAMPLES, spacing)
    found = sorted(recorder.candidates)
    assert len(found) == nodes + 1 and found[0] == 0 and found[-1] == steps
    factors = torch.tensor(found[1:], dtype=torch.float64).log().diff().exp()
    if spacing == "linear":
        assert max(torch.tensor(found).diff()) - min(torch.tensor(found).diff()) <= 1
    elif len(factors) and nodes**2 < steps:  # no step is pushed on by another
        assert factors[-1].item() == pytest.approx(steps ** (1 / nodes), rel=0.05)


def test_arc_spacing_writes_twice_as_many_states_and_thins_them_in_the_end(tmp_path):
    net = Shift()
    recorder = degrade.Recorder(tmp_path, net, 5, 100, SAMPLES)
    for step in range(1, 101):
        recorder.offer(net, step)
    assert len(recorder.candidates) == len(list(tmp_path.glob("step-*.safetensors"))) == 1 + 2 * 5
    assert len(recorder.close()) == len(list(tmp_path.glob("*.safetensors"))) == 1 + 5


@pytest.mark.parametrize("left_out", [4, 20])
def test_a_step_that_was_not_offered_is_missed(tmp_path, left_out):
    net = Shift()
    recorder = degrade.Recorder(tmp_path, net, 5, 20, SAMPLES, "linear")
    for step in range(1, 21):
        if step != left_out:
            recorder.offer(net, step)
    with pytest.raises(AssertionError, match="every step must be offered"):
        recorder.close()


@pytest.mark.parametrize("spacing", ["linear", "log", "arc"])
@pytest.mark.parametrize("nodes, steps", [(1, 1), (1, 9), (7, 7), (3, 50)])
def test_every_spacing_records_as_many_nodes_as_asked_for(tmp_path, spacing, nodes, steps):
    path, _ = record(tmp_path, nodes=nodes, steps=steps, spacing=spacing)
    assert len(path) == nodes + 1 and path.about["steps"][-1] == steps
    assert len(list(tmp_path.glob("*.safetensors"))) == nodes + 1  # no candidate is left behind


def test_the_adaptive_walk_waits_until_the_fake_has_caught_up_but_not_for_ever(tmp_path):
    path, _ = record(tmp_path)  # positions 0 … 20, so neighbours are 5 apart
    walk = disback.PathScheduler(path, Shift(), interval=2, adaptive=True)
    assert [walk.step(6.0), walk.step(6.0), walk.step(4.0), walk.step(4.0)] == [
        False, False, False, True]
    assert sum(1 for _ in iter(lambda: walk.step(6.0), True)) + 1 == 20  # at most 10 intervals


def test_a_scheduler_that_is_restored_has_its_node_its_age_and_its_sum_of_mismatches(tmp_path):
    path, _ = record(tmp_path)
    walk, other = (disback.PathScheduler(path, Shift(), 3, adaptive=True) for _ in range(2))
    for mismatch in (1.0, 1.0, 1.0, 6.0, 6.0):
        walk.step(mismatch)
    other.load_state_dict(walk.state_dict())
    assert other.target.shift.item() == 10.0  # node 2
    assert not other.step(4.0)  # (6 + 6 + 4) / 3 is above 5


def test_a_node_of_another_architecture_is_refused_by_its_name(tmp_path):
    path, _ = record(tmp_path)
    cause = "02.safetensors is broken or another network's, record anew: .*shift"
    with pytest.raises(disback.Refusal, match=cause):
        path.load(2, nn.Linear(2, 2))


def test_missing_too_long_and_truncated_nodes_are_refused(tmp_path):
    record(tmp_path)
    file = tmp_path / "02.safetensors"
    whole = file.read_bytes()
    for broken in (whole[:-1], whole + b"more", b""):
        file.write_bytes(broken)
        assert "02.safetensors" in refusal(disback.DegradationPath, tmp_path)
    file.unlink()
    assert "02.safetensors" in refusal(disback.DegradationPath, tmp_path)
    file.write_bytes(whole)
    assert len(disback.DegradationPath(tmp_path)) == 5


def test_a_folder_without_a_path_is_refused_with_the_remedy(tmp_path):
    assert "degrade.py" in refusal(disback.DegradationPath, tmp_path / "nothing")
    (tmp_path / "path.json").write_text("{ not json")
    assert "path.json" in refusal(disback.DegradationPath, tmp_path)
    (tmp_path / "path.json").write_text(json.dumps([1]))
    assert "path.json" in refusal(disback.DegradationPath, tmp_path)

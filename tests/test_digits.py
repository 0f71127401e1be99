"""The digits against what UCI says of them, and their classifier."""

import numpy as np
import pytest
import torch
from conftest import same

from imagenet64 import digits, figures


def test_the_digits_are_the_test_set_of_uci():
    """Classes as counted in optdigits.names; pixels count 0 to 16 inked cells."""
    images, labels = digits.load()
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    cells = ((images + 1) * 8)[:, 0]
    assert cells.unique().tolist() == [*range(17)]
    assert labels[0] == 0 and cells[0, 0].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]
    assert cells[0, 3].tolist() == [0, 4, 12, 0, 0, 8, 8, 0]  # a zero is empty in its middle


def test_the_two_parts_are_all_digits_each_once():
    (train, train_labels), (held_out, held_out_labels) = digits.split()
    images, labels = digits.load()
    assert len(train) == 1437 and len(held_out) == 360
    both = torch.cat([train, held_out]).flatten(1).numpy()
    np.testing.assert_array_equal(np.sort(both, axis=0), np.sort(images.flatten(1).numpy(), axis=0))
    assert torch.cat([train_labels, held_out_labels]).bincount().equal(labels.bincount())


def test_the_classifier_knows_digits_that_it_has_not_seen():
    _, (images, labels) = digits.split()
    assert (digits.classifier().classes(images) == labels).float().mean() >= 0.98


def test_the_classifier_has_64_features_from_which_alone_it_answers():
    net = digits.classifier()
    images = digits.load()[0][:50]
    features = net.features(images)
    assert features.shape == (50, 64)
    torch.testing.assert_close(features @ net.head.weight.T + net.head.bias, net(images))
    assert not net.training and not any(p.requires_grad for p in net.parameters())


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DISBACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digits, "STEPS", 5)
    yield tmp_path / "cache"
    torch.set_num_threads(1)


def test_no_seed_or_number_of_threads_changes_the_classifier_and_it_changes_neither(empty_cache):
    weights = []
    for n in (1, 2):
        torch.manual_seed(n)
        torch.set_num_threads(n)
        before = torch.get_rng_state()
        weights.append(digits.trained().state_dict())
        digits.classifier()  # trained into the cache, then read from it
        assert torch.get_rng_state().equal(before) and torch.get_num_threads() == n
    assert same(*weights)


def test_the_classifier_is_trained_once_and_again_when_its_training_changes(
        empty_cache, monkeypatch):
    first = digits.classifier().state_dict()
    (file,) = empty_cache.iterdir()
    written = file.stat().st_mtime_ns
    assert same(digits.classifier().state_dict(), first)
    assert file.stat().st_mtime_ns == written
    monkeypatch.setattr(digits, "STEPS", 6)
    assert not digits.classifier().head.weight.equal(first["head.weight"])
    assert len(list(empty_cache.iterdir())) == 2


@pytest.mark.parametrize("end, last", [(4, "after node 1:\niteration 4"),
                                       (6, "after node 0:\niteration 6")])
def test_the_way_back_has_no_row_of_a_node_that_was_no_target(monkeypatch, tmp_path, end, last):
    """The target switches to node 0 at iteration 4."""
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, file: drawn.append(figure))
    x0, found = torch.zeros(10, 1, 8, 8), {0: 2, 2: 1, 4: 0, end: 0}
    snapshots = [(step, {"x0": x0, "node": torch.tensor(node)}) for step, node in found.items()]
    figures.draw_path(tmp_path / "path.png", [x0] * 4, snapshots)
    (figure,) = drawn
    said = [text.get_text() for axis in figure.axes[1::2] for text in axis.texts]
    assert said[0] == last and len(said) == len(set(said))

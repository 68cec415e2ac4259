"""Surrogates on disk: bit-equal answers, no pickle, whole files or none."""

import errno
import json
import math
import os
import resource
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ksm_ext import (
    ANOVA2,
    RBF,
    Exponential,
    Laplace,
    Linear,
    Polynomial,
    Surrogate,
    fit_surrogate,
    load_surrogate,
    subsets,
)
from ksm_ext.surrogates.candidates import Candidate
from ksm_ext.surrogates.storage import checksum

SAVED = Path(__file__).parents[1] / "data"
MASKS = torch.rand(16, 5, generator=torch.Generator().manual_seed(0)) < 0.5
SCORES = torch.randn(16, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
FIXED = {"kernel": RBF(gamma=0.2), "ridge": 0.1}


def component_surrogate():
    """Latent columns with a rotation, whatever the fit prefers."""
    surrogate = fit_surrogate(MASKS, SCORES, **FIXED)
    rotation = torch.linalg.qr(SCORES[:3])[0]
    ridges = torch.tensor([0.1, 1.0, 2.0], dtype=torch.float64)
    (term,) = surrogate.kernel_terms
    terms = (replace(term, ridge=ridges),)
    return replace(surrogate, kernel_terms=terms, rotation=rotation, sharing="component")


SURROGATES = {
    "linear": lambda: fit_surrogate(MASKS, SCORES, kernel=Linear(), ridge=0.1),
    "polynomial": lambda: fit_surrogate(MASKS, SCORES, kernel=Polynomial(gamma=0.3), ridge=0.1),
    "anova2": lambda: fit_surrogate(MASKS, SCORES, kernel=ANOVA2(0.3), ridge=0.1),
    "exponential": lambda: fit_surrogate(MASKS, SCORES, kernel=Exponential(gamma=0.5), ridge=0.1),
    "decays of tasks": lambda: fit_surrogate(
        MASKS, SCORES, kernel=Exponential(gamma=(0.1, 0.2, 0.3, 0.4, 0.5), amplitude=0.7), ridge=0.1
    ),
    "sum": lambda: fit_surrogate(MASKS, SCORES, kernel=Linear() + 0.3 * RBF(gamma=0.1), ridge=0.1),
    "per target": lambda: fit_surrogate(MASKS, SCORES, share_ridge=False),
    "auto": lambda: fit_surrogate(MASKS, SCORES),
    "normal scores": lambda: fit_surrogate(MASKS, SCORES, warp="normal"),
    "no intercept": lambda: fit_surrogate(MASKS, SCORES, **FIXED, center=False),
    "lasso": lambda: fit_surrogate(MASKS, SCORES, kernel="lasso"),
    "least squares": lambda: fit_surrogate(MASKS, SCORES, kernel="least_squares"),
    "component": component_surrogate,
    "weights": lambda: fit_surrogate(0.3 * MASKS, SCORES, kernel=Laplace(gamma=1.0), ridge=0.1),
    "single float32": lambda: fit_surrogate(MASKS, SCORES[:, 0].float(), **FIXED),
    "numpy": lambda: fit_surrogate(MASKS.numpy(), SCORES.numpy(), **FIXED),
    "pandas": lambda: fit_surrogate(
        pd.DataFrame(MASKS.numpy(), columns=list("abcde")),
        pd.DataFrame(SCORES.numpy(), columns=["u", "v", "ŵ"]),
        **FIXED,
    ),
}


def answers(surrogate):
    query = MASKS[:4] if surrogate.masks.binary else 0.3 * MASKS[:4]
    yield surrogate.predict(query)
    yield surrogate.attribute("loo")
    yield surrogate.scores
    yield surrogate.loo_residuals
    yield surrogate.loo_error
    if surrogate.masks.binary:
        yield surrogate.attribute("shapley")
        yield surrogate.interactions("banzhaf")
        yield surrogate.walsh_spectrum()
    if surrogate.kernel_terms and not surrogate.linear_terms:
        yield surrogate.predict(query, return_std=True)[1]
    if surrogate.has_intervals:
        readout = "shapley" if surrogate.masks.binary else "loo"
        yield surrogate.attribute(readout, return_std=True)[1]


@pytest.mark.parametrize("make", SURROGATES.values(), ids=SURROGATES)
def test_answers_are_bit_equal_after_a_round_trip(make, tmp_path):
    surrogate = make()
    path = tmp_path / "surrogate.safetensors"
    surrogate.save(path)
    assert os.listdir(tmp_path) == [path.name]
    loaded = load_surrogate(str(path))
    for before, after in zip(answers(surrogate), answers(loaded), strict=True):
        assert type(before) is type(after) and np.shape(before) == np.shape(after)
        assert before.dtype == after.dtype if hasattr(before, "dtype") else True
        np.testing.assert_array_equal(np.asarray(before), np.asarray(after))
        if isinstance(before, pd.DataFrame):
            pd.testing.assert_frame_equal(before, after)
    assert str(loaded) == str(surrogate) and str(loaded.candidates) == str(surrogate.candidates)
    for name in ("task_names", "target_names", "sharing", "center", "single_target", "dtype"):
        assert getattr(loaded, name) == getattr(surrogate, name)
    again = tmp_path / "again"
    loaded.save(again)
    assert load_surrogate(again).predict([[1] * 5]).shape == surrogate.predict([[1] * 5]).shape


def test_the_file_is_safetensors_and_no_pickle(tmp_path):
    SURROGATES["sum"]().save(tmp_path / "s")
    assert parts_of(tmp_path / "s")[1]["format"] == "ksm_ext.surrogate.3"
    content = (tmp_path / "s").read_bytes()
    length = int.from_bytes(content[:8], "little")  # of the header, JSON
    assert "__metadata__" in json.loads(content[8 : 8 + length])


def test_equal_surrogates_make_equal_files(tmp_path):
    for name in "ab":
        SURROGATES["auto"]().save(tmp_path / name)
    one, other = (load_surrogate(tmp_path / name).predict(MASKS) for name in "ab")
    assert torch.equal(one, other)


@pytest.mark.parametrize("make", SURROGATES.values(), ids=SURROGATES)
def test_a_state_is_of_its_own(make):
    """Whatever is done to its tensors, the surrogate answers as before, and they are apart."""
    surrogate = make()
    before = answers(surrogate)
    tensors, _ = surrogate.state()
    places = [tensor.data_ptr() for tensor in tensors.values() if tensor.numel()]
    assert len(set(places)) == len(places)
    for tensor in tensors.values():
        tensor.zero_()
    for old, new in zip(before, answers(surrogate), strict=True):
        np.testing.assert_array_equal(np.asarray(old), np.asarray(new))


@pytest.mark.parametrize("make", SURROGATES.values(), ids=SURROGATES)
def test_a_state_is_tensors_and_plain_facts(make):
    surrogate = make()
    tensors, facts = surrogate.state()
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
    again = Surrogate.from_state(tensors, json.loads(json.dumps(facts)))
    for before, after in zip(answers(surrogate), answers(again), strict=True):
        np.testing.assert_array_equal(np.asarray(before), np.asarray(after))
    with pytest.raises(LookupError):
        Surrogate.from_state({name: tensors[name] for name in tensors if name != "unit"}, facts)
    with pytest.raises(ValueError, match="`unit` must be"):
        Surrogate.from_state(tensors | {"unit": tensors["unit"][:0]}, facts)


# -- what is no surrogate -----------------------------------------------------------------------


def test_missing_file(tmp_path):
    for path, remedy in ((tmp_path / "none", "Check where"), (tmp_path, "Name a file in it")):
        form = rf"^`path` must be a file, got .*\. {remedy}"
        with pytest.raises(FileNotFoundError, match=form):
            load_surrogate(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:4],
        lambda content: content[:100],
        lambda content: content[:-1],
        lambda content: b"\x80\x04" + content,
        lambda content: b"hello, this is text",
        lambda content: content[:8] + b"\xff" + content[9:],
    ],
    ids=["empty", "4 bytes", "100 bytes", "one byte short", "shifted", "text", "header"],
)
def test_damaged_files(damage, tmp_path):
    path = tmp_path / "s"
    SURROGATES["linear"]().save(path)
    path.write_bytes(damage(path.read_bytes()))
    form = r"^`path` must be a saved surrogate, got .*/s \(.*\)\. The file is damaged or no safe"
    with pytest.raises(ValueError, match=form):
        load_surrogate(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "ksm_ext.surrogate.99"}])
def test_foreign_safetensors(metadata, tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "x", metadata=metadata)
    found = (metadata or {}).get("format")
    form = rf"^`path` must be a saved surrogate, got .* with format {found!r}\. This version reads"
    with pytest.raises(ValueError, match=form):
        load_surrogate(tmp_path / "x")


CANDIDATE = asdict(Candidate("rbf", 0.1, 0.5, 0.5, 16, 3))
DAMAGED = r"^`path` must be a saved surrogate, got .*/s \(.*\)\. The file is damaged: save the"


def parts_of(path):
    """The tensors and the metadata of a file."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def changed_facts(path, change):
    """The surrogate's file with other facts, or without one that ``change`` gives None."""
    tensors, metadata = parts_of(path)
    facts = json.loads(metadata["facts"]) | change
    facts = {name: x for name, x in facts.items() if x is not None or name not in change}
    saved(path, tensors, metadata | {"facts": json.dumps(facts)})


def saved(path, tensors, metadata):
    """A file of these parts that nothing damaged: with the checksum of what is in it."""
    save_file(tensors, path, metadata | {"checksum": checksum(metadata["facts"], tensors)})


@pytest.mark.parametrize(
    "change",
    [
        {"kernels": None},
        {"kernels": [{"name": "unknown"}]},
        {"kernels": [{"name": "rbf", "gamma": None}]},
        {"kernels": [{"name": "rbf", "gamma": "1"}]},
        {"kernels": [{"name": "rbf", "width": 1.0}]},
        {"kernels": [{"name": "sum", "terms": []}]},
        {"kernels": [{"name": "rbf", "gamma": [0.1, 0.2]}]},
        {"kernels": [{"name": "rbf", "gamma": [0.1, 0.2, 0.3, 0.4, -0.5]}]},
        {"kernels": [{"name": "rbf", "gamma": 0.1, "amplitude": 1e3}]},
        {"kernels": [{"name": "polynomial", "degree": 1e400, "gamma": 1.0}]},
        {"kernels": []},
        {"num_linear": 1},
        {"task_names": ["a"]},
        {"target_names": [1, 2, 3]},
        {"dtype": "load"},
        {"dtype": "int64"},
        {"kind": "jax"},
        {"sharing": "none"},
        {"center": 1},
        {"all_is_noise": 1},
        {"noise_degrees": -1},
        {"noise_degrees": 1.5},
        {"single_target": True},
        {"candidates": [{"kernel": "rbf"}]},
        {"candidates": 3},
        {"candidates": [dict(CANDIDATE, error=math.nan)]},
        {"candidates": [dict(CANDIDATE, rank_correlation=2.0)]},
        {"candidates": [dict(CANDIDATE, num_subsets=-1)]},
        {"task_names": list("aabcd")},
        {"target_names": list("xyx")},
        {"kernels": [{"name": "polynomial", "degree": 2, "gamma": math.nan}]},
        {"kernels": [{"name": "polynomial", "degree": 2, "gamma": 1.0, "coef0": math.inf}]},
    ],
    ids=str,
)
def test_facts_that_do_not_fit(change, tmp_path):
    path = tmp_path / "s"
    SURROGATES["polynomial"]().save(path)
    changed_facts(path, {})
    load_surrogate(path)
    changed_facts(path, change)
    if change == {"kernels": []}:  # a surrogate of its mean
        assert load_surrogate(path).predict(MASKS).shape == (16, 3)
        return
    with pytest.raises(ValueError, match=DAMAGED):
        load_surrogate(path)


@pytest.mark.parametrize("name", ["masks", "intercept", "residuals", "kernel.0.dual"])
@pytest.mark.parametrize("change", ["missing", "short", "dtype", "columns"])
def test_tensors_that_do_not_fit(name, change, tmp_path):
    path = tmp_path / "s"
    SURROGATES["linear"]().save(path)
    tensors, metadata = parts_of(path)
    tensor = tensors.pop(name)
    if change == "columns":
        tensors["kernel.0.columns"] = torch.tensor([0, 1, 3])
    if change != "missing":
        tensors[name] = {"short": tensor[1:], "dtype": tensor.half(), "columns": tensor}[change]
    saved(path, tensors, metadata)
    with pytest.raises(ValueError, match=DAMAGED):
        load_surrogate(path)


@pytest.mark.parametrize("path", sorted(SAVED.glob("*.safetensors")), ids=lambda path: path.stem)
def test_tables_of_any_other_shape_are_refused(path, tmp_path):
    """By one error, whichever is compared with which first."""
    tensors, metadata = parts_of(path)
    for name, tensor in tensors.items():
        cases = [tensor[:-1], tensor[None], tensor.repeat(3, *([1] * (tensor.ndim - 1)))]
        for other in cases if tensor.ndim else []:
            saved(tmp_path / "s", tensors | {name: other.contiguous()}, metadata)
            with pytest.raises(ValueError, match=DAMAGED):
                load_surrogate(tmp_path / "s")


@pytest.mark.parametrize(
    "name, value",
    [
        *((name, math.nan) for name in ("intercept", "scores", "residuals", "kernel.0.dual")),
        *((name, math.inf) for name in ("intercept", "kernel.0.ridge")),
        *((f"kernel.0.{name}", -1.0) for name in ("ridge", "signal_variance", "most_noise")),
        ("score_variance", -1.0),
        ("masks", math.nan),
        ("kernel.0.columns", 1),
    ],
)
def test_numbers_that_cannot_be(name, value, tmp_path):
    path = tmp_path / "s"
    SURROGATES["weights" if name == "masks" else "linear"]().save(path)
    tensors, metadata = parts_of(path)
    tensors[name].view(-1)[0] = value
    saved(path, tensors, metadata)
    with pytest.raises(ValueError, match=DAMAGED):
        load_surrogate(path)


# -- disks that fail ----------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(step, tmp_path, monkeypatch):
    path = tmp_path / "s"
    SURROGATES["linear"]().save(path)
    old = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if step == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "replace", full)
    form = r"`path` must be writable, got .*/s: No space left on device\. Free some space"
    with pytest.raises(OSError, match=form) as caught:
        SURROGATES["sum"]().save(path)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["s"]


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files by RLIMIT_FSIZE")
def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path):
    """A real short write, in a process of its own."""
    path = tmp_path / "s"
    SURROGATES["linear"]().save(path)
    old = path.read_bytes()
    code = f"""
import resource, signal
from pathlib import Path
from ksm_ext.atomic_write import write_whole
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, {resource.RLIM_INFINITY}))
try:
    write_whole(Path({str(path)!r}), bytes(100_000))
except OSError as error:
    print(error.errno, error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith(str(errno.EFBIG)) and "`path` must be writable" in run.stdout
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["s"]


def test_a_folder_that_is_not_there(tmp_path):
    form = r"`path` must be in a folder that exists, got .*no/s\. Make the folder \(`mkdir -p "
    with pytest.raises(OSError, match=form):
        SURROGATES["linear"]().save(tmp_path / "no" / "s")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only folders")
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=r"`path` must be writable"):
        SURROGATES["linear"]().save(tmp_path / "s")
    tmp_path.chmod(0o700)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("is_there", [True, False])
def test_saving_over_a_link_writes_what_it_points_to(tmp_path, is_there):
    for name in ("there", "links"):
        (tmp_path / name).mkdir()
    target, link, other = (tmp_path / name for name in ("there/s", "links/s", "links/t"))
    if is_there:
        target.write_bytes(b"old")
    link.symlink_to(Path("../there/s"))
    other.symlink_to(link)  # one link to another
    surrogate = SURROGATES["linear"]()
    surrogate.save(other)
    assert link.is_symlink() and other.is_symlink() and not target.is_symlink()
    assert target.read_bytes() == link.read_bytes()
    assert os.listdir(tmp_path / "there") == ["s"] and len(os.listdir(tmp_path / "links")) == 2
    assert torch.equal(load_surrogate(target).predict(MASKS), surrogate.predict(MASKS))


def test_saving_over_a_link_to_itself(tmp_path):
    (tmp_path / "s").symlink_to("s")
    form = r"`path` must be writable, got .*/s: Too many levels of symb"
    with pytest.raises(OSError, match=form):
        SURROGATES["linear"]().save(tmp_path / "s")
    assert (tmp_path / "s").is_symlink() and os.listdir(tmp_path) == ["s"]


def test_saving_over_a_folder(tmp_path):
    (tmp_path / "s").mkdir()
    with pytest.raises(IsADirectoryError, match=r"`path` must be a file, got the folder .*/s\. Na"):
        SURROGATES["linear"]().save(tmp_path / "s")
    assert os.listdir(tmp_path) == ["s"]


def test_no_flipped_bit_is_another_answer(tmp_path):
    path = tmp_path / "s"
    SURROGATES["auto"]().save(path)
    content = bytearray(path.read_bytes())
    expected = load_surrogate(path).predict(MASKS)
    generator = np.random.default_rng(0)
    for place in generator.integers(0, len(content), 200):
        damaged = content.copy()
        damaged[place] ^= 1 << int(place % 8)
        path.write_bytes(damaged)
        try:
            found = load_surrogate(path)
        except ValueError:
            continue
        assert np.array_equal(np.asarray(found.predict(MASKS)), np.asarray(expected))


@pytest.mark.parametrize(
    "path", sorted(SAVED.glob("format_2*.safetensors")), ids=lambda path: path.stem
)
def test_files_of_earlier_versions_answer_as_they_did(path, tmp_path):
    """Files of format 2, and answers of the version that wrote them."""
    expected = json.loads((SAVED / "format_2.json").read_text())[path.stem]
    surrogate = load_surrogate(path)
    surrogate.save(tmp_path / "again")
    for loaded in (surrogate, load_surrogate(tmp_path / "again")):
        assert loaded.target_names == ("loss", "größe")
        predicted = loaded.predict([[1, 0, 0, 1], [0, 1, 1, 0], [1, 1, 0, 0]])
        values, std = loaded.attribute("shapley"), None
        if expected["std"] is not None:
            values, std = loaded.attribute("shapley", return_std=True)
        answers = {"predict": predicted, "shapley": values, "std": std}
        for name, answer in answers.items():
            if answer is not None:
                np.testing.assert_allclose(answer, expected[name], rtol=1e-9, err_msg=name)


def test_files_of_the_former_format_answer_as_they_did(tmp_path):
    """What the writer before made of the same surrogate: units in the terms, no observations."""
    masks = subsets.all_subsets(5)[torch.randperm(32)[:20]]
    scores = masks.double() @ torch.randn(5, 2).double() * torch.tensor([1.0, 50.0]) + 3
    surrogate = fit_surrogate(masks, scores, kernel="rbf", ridge=0.1)
    surrogate.save(tmp_path / "new")
    tensors, metadata = parts_of(tmp_path / "new")
    unit = surrogate.unit
    for name in ("unit", "gaps", "own", "known", "counts", "apart", "varying", "kernel.0.weights"):
        tensors.pop(name, None)
    columns = tensors["kernel.0.columns"]
    tensors["kernel.0.dual"] = tensors["kernel.0.dual"] * unit[columns]
    tensors["kernel.0.signal_variance"] *= unit[columns].square()
    save_file(tensors, tmp_path / "old", metadata | {"format": "ksm_ext.surrogate.2"})
    loaded = load_surrogate(tmp_path / "old")
    torch.testing.assert_close(loaded.predict(masks), surrogate.predict(masks))
    torch.testing.assert_close(loaded.attribute("shapley"), surrogate.attribute("shapley"))
    torch.testing.assert_close(loaded.loo_error, surrogate.loo_error)

"""`ksm doctor` says what works, what is wrong and what is missing."""

import json
import re
from pathlib import Path
from unittest.mock import Mock

import torch

from ksm_ext.cli import main
from ksm_ext.cli.doctor import EXTRAS

ROOT = Path(__file__).parent.parent.parent


def test_doctor_runs_an_operator(capsys):
    assert main(["doctor"]) == 0
    assert "operators   on cpu: works" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["works"] and facts["versions"]["torch"] == torch.__version__
    assert facts["build"]["cpu_instruction_set"] in ("avx512", "avx2", "portable")


def test_doctor_says_what_is_wrong_and_what_is_missing(monkeypatch, capsys):
    mask_gram = Mock(return_value=torch.zeros(4, 4))
    monkeypatch.setattr("ksm_ext.cli.doctor.ops.mask_gram", mask_gram)
    monkeypatch.setattr("ksm_ext.cli.doctor.find_spec", lambda name: None)
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "on cpu: is wrong by 1" in text and "reinstall" in text
    assert 'matplotlib, for figures: ksm_ext.plotting: pip install "ksm_ext[plot]"' in text
    mask_gram.side_effect = RuntimeError("no kernel")
    assert main(["doctor"]) == 1 and "fails: no kernel" in capsys.readouterr().out


def test_extras_named_by_the_doctor_exist():
    text = (ROOT / "pyproject.toml").read_text()
    for name in re.findall(r"ksm_ext\[(\w+)\]", str(EXTRAS)):
        assert f"\n{name} = [" in text

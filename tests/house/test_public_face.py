"""What a reader gets after ``import ksm_ext``."""

import subprocess
import sys

import ksm_ext


def test_every_public_name_is_found():
    assert not [name for name in ksm_ext.__all__ if getattr(ksm_ext, name, None) is None]
    assert callable(ksm_ext.attribution.influence), "not the module of that name"


def test_import_loads_nothing_that_was_not_asked_for():
    code = (
        "import sys, ksm_ext; print([name for name in ('torch', 'numpy') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"

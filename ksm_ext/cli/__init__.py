"""The command line ``ksm``: from scores in a file to attributions, a selection and a report."""

from ksm_ext.cli.program import main as main

"""Formats: how a quantized model lies in files, one row of `table.FORMATS` each."""

from fewbit.formats.exports import already_there, export, export_directory, verify
from fewbit.formats.table import EXPORTERS, FORMATS, exporter, holding
from fewbit.formats.verification import Verification

__all__ = [
    "EXPORTERS",
    "FORMATS",
    "Verification",
    "already_there",
    "export",
    "export_directory",
    "exporter",
    "holding",
    "verify",
]

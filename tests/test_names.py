"""What `import fewbit` offers: every name of `__init__.pyi`, imported when it is used."""

import importlib.resources

import pytest

import fewbit
from fewbit import quark
from fewbit.errors import FewbitError


def test_every_name_is_there_after_import_fewbit():
    assert len(fewbit.__all__) == len(set(fewbit.__all__)) > 40
    for name in fewbit.__all__:
        assert getattr(fewbit, name) is not None
    assert set(fewbit.__all__) <= set(dir(fewbit))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'fewbit' has no attribute 'Int4PerGroupSpec'"):
        _ = fewbit.Int4PerGroupSpec


def test_names_of_quark_are_in_fewbit_quark():
    assert quark.QConfig is fewbit.Config is quark.Config
    assert quark.QLayerConfig is fewbit.QuantizationConfig
    assert quark.QTensorConfig is fewbit.QuantizationSpec
    assert quark.ModelQuantizer is fewbit.ModelQuantizer
    assert fewbit.quark.Int4PerGroupSpec is quark.Int4PerGroupSpec


def test_load_says_what_to_use_until_it_is_offered():
    with pytest.raises(
        FewbitError, match=r"cannot yet open run .*from_pretrained.*fewbit\.evaluate.*fewbit\.io\.load"
    ):
        fewbit.load("run")


def test_type_checkers_are_told_that_fewbit_has_types():
    assert importlib.resources.files("fewbit").joinpath("py.typed").is_file()

"""Every field of a configuration is explained where people look: in the docstring, and on the command line."""

import dataclasses
import inspect
import re

import pytest

from trl_opsd.compress.auto_config import AutoConfig
from trl_opsd.compress.config import CompressConfig
from trl_opsd.evaluate.config import EvaluateConfig
from trl_opsd.export.config import ExportConfig
from trl_opsd.opsd.config import OPSDConfig
from trl_opsd.plan.config import PlanArguments
from trl_opsd.prune.config import PruneConfig
from trl_opsd.rlvr.config import RLVRConfig
from trl_opsd.small.task import SmallConfig
from trl_opsd.tiny.task import TinyConfig


CONFIGS = [
    TinyConfig,
    SmallConfig,
    RLVRConfig,
    PruneConfig,
    OPSDConfig,
    EvaluateConfig,
    ExportConfig,
    PlanArguments,
    CompressConfig,
    AutoConfig,
]


def own_fields(config):
    return {field.name: field for field in dataclasses.fields(config) if field.name in vars(config)["__annotations__"]}


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_is_in_the_docstring_and_has_help(config):
    own = own_fields(config)
    assert sorted(re.findall(r"^ {4}(\w+) \(`", inspect.getdoc(config), re.MULTILINE)) == sorted(own)
    assert [name for name, field in own.items() if not field.metadata.get("help")] == []


@pytest.mark.parametrize("config", CONFIGS)
def test_defaults_in_the_docstring_are_the_defaults(config):
    own = own_fields(config)
    for name, text in re.findall(
        r"^ {4}(\w+) \(.*, \*optional\*, defaults to `(.*)`\):", inspect.getdoc(config), re.MULTILINE
    ):
        field = own[name]
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        assert text.strip('"').replace('"', "'") == str(default), name

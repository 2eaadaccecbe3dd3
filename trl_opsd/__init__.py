"""trl-opsd: the stage after RL. On-policy (self-)distillation as compression of reasoning models, on TRL."""

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING


__version__ = "0.1.0"

# Those of pyproject.toml, which pip looks at when it installs and nobody afterwards
_SUPPORTED = {"trl": ">=1.16,<1.17", "transformers": ">=5.17", "accelerate": ">=1.10"}
_NAMES = {"trl": ("overrides private methods of TRL", "TRL")}

for _package, _range in _SUPPORTED.items():
    try:
        _found = version(_package)
    except PackageNotFoundError:
        _found = None
    if _found is not None:
        from packaging.specifiers import SpecifierSet  # which a Python without any of these may not have

        if SpecifierSet(_range).contains(_found, prereleases=True):
            continue
    _needs, _name = _NAMES.get(_package, (f"needs {_package}", _package))
    _message = f"trl-opsd {__version__} {_needs} {_range}, and " + (
        f"`{sys.executable}` has no {_name}: is that the Python of your environment?"
        if _found is None
        else f"{_name} {_found} is installed: run `pip install '{_package}{_range}'`."
    )
    if sys.argv[0] == "-m":  # a command line, whose package is imported first
        sys.stderr.write(f"error: {_message}\n")
        raise SystemExit(2)
    raise ImportError(_message)

# Only a supported TRL is sure to have it
from trl._lazy_module import _LazyModule  # noqa: E402


_import_structure = {
    "opsd": ["OPSDConfig", "OPSDTrainer"],
    "rlvr": ["RLVRConfig", "RLVRTrainer"],
}

if TYPE_CHECKING:
    from .opsd import OPSDConfig, OPSDTrainer
    from .rlvr import RLVRConfig, RLVRTrainer
else:
    sys.modules[__name__] = _LazyModule(
        __name__,
        __file__,
        _import_structure,
        module_spec=__spec__,
        extra_objects={"__version__": __version__, "_SUPPORTED": _SUPPORTED},
    )

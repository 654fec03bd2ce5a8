"""`AutoConfig` and `AutoModel...` know upgraded checkpoints once `loglinear` is imported, before or after transformers.

Importing loglinear must not import transformers. So a finder waits until transformers' module of configurations has
been imported, registers one configuration class there, and is gone. The class imports the rest when a checkpoint needs
it. Nothing of transformers is replaced: `CONFIG_MAPPING.register` is its own way to add a configuration.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

TRANSFORMERS = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Register `UpgradeConfig` with transformers, but not with a version before 5, for which there are no upgrades."""
    try:
        from loglinear.autoload.configuration import UpgradeConfig
    except ImportError:  # the operators work beside any version
        return
    sys.modules[TRANSFORMERS].CONFIG_MAPPING.register(UpgradeConfig.model_type, UpgradeConfig, exist_ok=True)


class AfterTransformers(MetaPathFinder):
    """Calls `register` after the import of transformers' module of configurations."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TRANSFORMERS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            register()

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def start() -> None:
    """Register now if transformers' module of configurations is there, else after its import."""
    module = sys.modules.get(TRANSFORMERS)
    if hasattr(module, "CONFIG_MAPPING"):
        register()
    elif not any(isinstance(finder, AfterTransformers) for finder in sys.meta_path):
        sys.meta_path.insert(0, AfterTransformers())

"""distclip: every rank clips identically."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

# public beside the names of api.py; all other files may change with any release
_MODULES = ("errors", "integrations", "kernels", "testing", "versions")

if TYPE_CHECKING:
    from distclip.api import *  # noqa: F403
else:

    def __getattr__(name):
        """Files beside this one by their names; the first public name that is asked for imports
        them all, and torch.

        So `distclip --help` waits for nothing. Type checkers read the imports above and go on
        reporting misspelt names.
        """
        import sys
        from importlib import import_module
        from importlib.util import find_spec

        if name == "__all__" or not name.startswith("_"):
            if find_spec(f"{__name__}.{name}") is not None:
                return import_module(f"{__name__}.{name}")
            api = import_module(f"{__name__}.api")
            globals().update(
                {public: getattr(api, public) for public in api.__all__}, __all__=api.__all__
            )
            if name in globals():
                return globals()[name]
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__]
        )

    def __dir__():
        special = {name for name in globals() if name.startswith("__")}
        return sorted({*__getattr__("__all__"), *_MODULES, *special})

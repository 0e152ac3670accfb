"""Steps that a test skips on purpose: without a sink the clipper warns of them, and warnings are
errors."""

import warnings
from contextlib import ContextDecorator

# for a mark, where some cases of a test skip and others do not
IGNORED = "ignore:step [0-9]+ is skipped"


class told(ContextDecorator):
    """Around a block or a function, on each rank: skipped steps are told, `least` at least; all
    other warnings stay what they were."""

    def __init__(self, least=1):
        self.least = least

    def __enter__(self):
        self._caught = warnings.catch_warnings()
        self._caught.__enter__()
        self._before = warnings.showwarning
        self.texts = []
        warnings.filterwarnings("always", "step [0-9]+ is skipped", RuntimeWarning)
        warnings.showwarning = self._show
        return self

    def __exit__(self, kind, error, trace):
        self._caught.__exit__(kind, error, trace)
        assert kind is not None or len(self.texts) >= self.least, self.texts

    def _show(self, message, category, *place):
        if category is RuntimeWarning and " is skipped: " in str(message):
            self.texts.append(str(message))
        else:
            self._before(message, category, *place)

"""What every test runs under: annotations checked at run time, one thread."""

from __future__ import annotations

from collections.abc import Iterator

import jaxtyping
import pytest
import torch

# before guerdon is imported anywhere: shapes and types of every annotated argument are checked in all tests
jaxtyping.install_import_hook("guerdon", "beartype.beartype")

torch.set_num_threads(1)


@pytest.fixture
def friendly_errors() -> Iterator[None]:
    """Switch the run-time annotation checks off, so that the library's own error messages can be seen."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)

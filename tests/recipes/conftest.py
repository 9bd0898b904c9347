"""Fixtures of the recipes' tests."""

import pytest

from tests.recipes.material import make_files


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Folder with the files of `make_files`; not to be written to."""
    return make_files(tmp_path_factory.mktemp("files"))

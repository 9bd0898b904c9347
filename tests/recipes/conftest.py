"""Fixtures of the recipes' tests."""

import pytest

from tests.recipes.material import make_files
from umedtrain.distributed.world import finalize, initialize


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Folder with the files of `make_files`; not to be written to."""
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def world():
    """This process as the only rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MASTER_ADDR", raising=False)
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
            patch.setenv(name, value)
        yield initialize()
        finalize()

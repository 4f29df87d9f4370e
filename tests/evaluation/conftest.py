import pytest

from tests.small import small


@pytest.fixture(scope="package")
def resnet(tmp_path_factory):
    return small(tmp_path_factory.mktemp("resnet"), "resnet18")

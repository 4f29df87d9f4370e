import pytest

from tests.small import small


@pytest.fixture(scope="package")
def resnet(tmp_path_factory):
    return small(tmp_path_factory.mktemp("resnet"), "resnet18")


@pytest.fixture(scope="package")
def vit(tmp_path_factory):
    return small(tmp_path_factory.mktemp("vit"), "vit_small")


@pytest.fixture(params=["resnet", "vit"])
def cell(request):
    return request.getfixturevalue(request.param)

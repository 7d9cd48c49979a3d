"""Passwords and keys leave addresses and texts."""

import pytest

from pipeline.tracking import credentials


@pytest.mark.parametrize(
    "address, bare, user, password",
    [
        ("http://bob:s3cret@server:5000/mlflow", "http://server:5000/mlflow", "bob", "s3cret"),
        ("https://bob:s3%2Fcr%40t@server", "https://server", "bob", "s3/cr@t"),
        ("https://bob:s3/cr@t@server", "https://server", "bob", "s3/cr@t"),  # as it should not be written
        ("https://token@server", "https://server", "token", ""),
    ],
)
def test_login_leaves_the_address_of_a_server(address, bare, user, password):
    environment = {"MLFLOW_TRACKING_URI": address, "HOME": "/home/bob"}
    credentials.separate(environment)
    assert environment == {
        "MLFLOW_TRACKING_URI": bare,
        "MLFLOW_TRACKING_USERNAME": user,
        "MLFLOW_TRACKING_PASSWORD": password,
        "HOME": "/home/bob",
    }


@pytest.mark.parametrize("address", [None, "http://server:5000", "sqlite:////home/bob@work/mlflow.db"])
def test_address_without_a_login_stays_as_it_is(address):
    environment = {} if address is None else {"MLFLOW_TRACKING_URI": address}
    credentials.separate(environment)
    assert environment == ({} if address is None else {"MLFLOW_TRACKING_URI": address})


def test_secrets_of_the_environment_are_hidden_wherever_they_stand():
    environment = {
        "MLFLOW_TRACKING_URI": "postgresql://bob:s3/cr@t@db/mlflow",
        "AWS_SECRET_ACCESS_KEY": "wJalr",
        "MLFLOW_TRACKING_PASSWORD": "abc",  # too short to be looked for
        "AWS_SESSION_TOKEN": "",
    }
    text = "postgresql://bob:s3/cr@t@db/mlflow, key wJalr, abcd, http://eve:pw@host/a@b, models:/qpruner@champion"
    assert credentials.hidden(text, environment) == (
        "postgresql://db/mlflow, key ***, abcd, http://host/a@b, models:/qpruner@champion"
    )

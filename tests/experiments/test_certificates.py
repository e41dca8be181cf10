import errno
import ipaddress
import os
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from experiments import certificates as module
from experiments.certificates import make_node_key, make_server_certificate
from experiments.cli import main
from mops_fl.errors import InputError

LONG_NAME = "ec2-203-0-113-25.ap-southeast-1.compute.cloud.example.org"  # longer than a certificate's subject may be


def certificate_in(folder, name="server.crt"):
    return x509.load_pem_x509_certificate((folder / name).read_bytes())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def handshake(folder, authority, hostname):
    """A TLS connection to a server with the folder's certificate, by a client that trusts `authority`."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "server.crt", folder / "server.key")
    client = ssl.create_default_context(cafile=authority)
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
    ours, theirs = socket.socketpair()

    def serve():
        try:
            server.wrap_socket(theirs, server_side=True).close()
        except OSError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        client.wrap_socket(ours, server_hostname=hostname).close()
    finally:
        ours.close()
        thread.join()


@pytest.mark.parametrize(
    "hostname", ["fleet.example.org", "10.0.0.5", "localhost", "127.0.0.1", LONG_NAME, "a.many.example.org"]
)
def test_certificate_is_good_for_every_name_of_the_server(tmp_path, hostname):
    make_server_certificate(tmp_path, [LONG_NAME, "fleet.example.org", "10.0.0.5", "*.many.example.org"])
    handshake(tmp_path, tmp_path / "ca.crt", hostname)


def test_other_names_and_other_authorities_are_refused(tmp_path):
    make_server_certificate(tmp_path / "ours", ["fleet.example.org"])
    make_server_certificate(tmp_path / "theirs", ["fleet.example.org"])
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(tmp_path / "ours", tmp_path / "ours" / "ca.crt", "evil.example.org")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path / "ours", tmp_path / "theirs" / "ca.crt", "fleet.example.org")


def test_expired_certificate_is_refused_and_renewed_by_the_same_authority(tmp_path, monkeypatch):
    make_server_certificate(tmp_path, ["localhost"])
    authority = (tmp_path / "ca.crt").read_bytes()

    class TwoYearsAgo(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) - timedelta(days=730)

    with monkeypatch.context() as patch:
        patch.setattr(module, "datetime", TwoYearsAgo)
        make_server_certificate(tmp_path, ["localhost"], days=30)
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(tmp_path, tmp_path / "ca.crt", "localhost")
    make_server_certificate(tmp_path, ["localhost"])
    handshake(tmp_path, tmp_path / "ca.crt", "localhost")
    assert (tmp_path / "ca.crt").read_bytes() == authority


def test_certificate_says_what_it_may_be_used_for(tmp_path):
    make_server_certificate(tmp_path, ["fleet.example.org", "10.0.0.5"], days=10)
    server, authority = certificate_in(tmp_path), certificate_in(tmp_path, "ca.crt")
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fleet.example.org", "localhost"]
    assert names.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address(host) for host in ("10.0.0.5", "127.0.0.1")
    ]
    assert timedelta(days=9) < server.not_valid_after_utc - datetime.now(UTC) <= timedelta(days=10)
    for certificate, is_authority in ((server, False), (authority, True)):
        assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is is_authority
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
        assert (usage.key_cert_sign, usage.digital_signature) == (is_authority, not is_authority)


def test_private_keys_are_for_their_owner_alone_and_never_replaced(tmp_path):
    make_server_certificate(tmp_path, ["localhost"])
    make_node_key(tmp_path, "site")
    for name in ("ca.key", "server.key", "site"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
    secret = (tmp_path / "site").read_bytes()
    with pytest.raises(InputError, match="never replaced"):
        make_node_key(tmp_path, "site")
    assert (tmp_path / "site").read_bytes() == secret


@pytest.mark.parametrize("missing", ["site", "site.pub"])
def test_half_a_key_pair_is_neither_replaced_nor_completed(tmp_path, missing):
    make_node_key(tmp_path, "site")
    (tmp_path / missing).unlink()
    before = contents(tmp_path)
    with pytest.raises(InputError, match="never replaced"):
        make_node_key(tmp_path, "site")
    assert contents(tmp_path) == before


def test_authority_whose_key_is_elsewhere_is_not_replaced(tmp_path):
    make_server_certificate(tmp_path, ["localhost"])
    key = (tmp_path / "ca.key").read_bytes()
    (tmp_path / "ca.key").unlink()
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"bring ca.key back, or use another folder"):
        make_server_certificate(tmp_path, ["localhost"])
    (tmp_path / "ca.crt").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"has server.crt, but not the ca.key"):
        make_server_certificate(tmp_path, ["localhost"])
    (tmp_path / "elsewhere").rename(tmp_path / "ca.crt")
    assert contents(tmp_path) == before
    (tmp_path / "ca.key").write_bytes(key)
    make_server_certificate(tmp_path, ["localhost"])
    assert (tmp_path / "ca.crt").read_bytes() == before["ca.crt"]


def test_certificate_never_outlives_its_authority(tmp_path, monkeypatch):
    for days in (20_000, 3_000_000):
        with pytest.raises(InputError, match=r"authority itself lasts until 20\d\d-\d\d-\d\d; give at most 3649 days"):
            make_server_certificate(tmp_path / "new", ["localhost"], days)
    assert not (tmp_path / "new").exists()

    monkeypatch.setattr(module, "AUTHORITY_DAYS", 1)
    with pytest.raises(InputError, match="make a new one in another folder"):
        make_server_certificate(tmp_path / "new", ["localhost"], days=1)
    monkeypatch.setattr(module, "AUTHORITY_DAYS", 30)
    make_server_certificate(tmp_path, ["localhost"], days=29)
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"--days is 397, but .* give at most 29 days"):
        make_server_certificate(tmp_path, ["localhost"])

    class NextYear(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(days=365)

    monkeypatch.setattr(module, "datetime", NextYear)
    with pytest.raises(InputError, match="make a new one in another folder"):
        make_server_certificate(tmp_path, ["localhost"], days=1)
    assert contents(tmp_path) == before


def test_pair_that_cannot_be_written_leaves_the_older_one(tmp_path, monkeypatch):
    make_server_certificate(tmp_path, ["localhost"])
    before = contents(tmp_path)
    open_file = os.open

    def full(path, flags, mode=0o777):
        if ".key" in str(path):  # the second file of the pair
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return open_file(path, flags, mode)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(InputError, match="cannot be written \\(No space left"):
        make_server_certificate(tmp_path, ["localhost"])
    assert contents(tmp_path) == before


def test_node_key_is_what_flower_takes(tmp_path):
    make_node_key(tmp_path, "site")
    private = load_ssh_private_key((tmp_path / "site").read_bytes(), None)
    public = load_ssh_public_key((tmp_path / "site.pub").read_bytes())
    assert isinstance(private.curve, ec.SECP384R1)
    assert private.public_key() == public


def test_commands_make_what_the_documentation_says(tmp_path, capsys):
    assert main(["certificates", "server", str(tmp_path / "authority"), "--host", "fleet.example.org"]) == 0
    assert main(["certificates", "node", str(tmp_path / "keys"), "hospital-a"]) == 0
    names = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert names == ["ca.crt", "ca.key", "hospital-a", "hospital-a.pub", "server.crt", "server.key"]
    output = capsys.readouterr().out
    assert "ca.key: keep secret" in output
    assert "hospital-a.pub: give to who runs the SuperLink" in output


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["server", "{}", "--host", "x", "--days", "0"], "--days is 0"),
        (["server", "{}/file", "--host", "x"], "file cannot be written"),
        (["server", "{}/authority", "--host", "x"], "cannot be written (Is a directory)"),
        (["node", "{}", "s" * 253], "cannot be written"),  # its .pub has too long a name
        (["server", "{}", "--host", "münchen.example"], "in their xn-- form"),
        (["node", "{}", "taken"], "never replaced"),
    ],
)
def test_bad_input_ends_with_one_sentence_and_code_2(tmp_path, capsys, arguments, complaint):
    (tmp_path / "file").touch()
    (tmp_path / "taken").touch()
    (tmp_path / "authority" / "server.key").mkdir(parents=True)
    before = contents(tmp_path)
    assert main(["certificates", *(argument.format(tmp_path) for argument in arguments)]) == 2
    errors = capsys.readouterr().err
    assert complaint in errors
    assert errors.count("\n") == 1
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "host",
    ["", "fleet example.org", " 10.0.0.5", "fleet.example.org:9092", "https://fleet.example.org", "203.0.113.7/24",
     "203.0.113.256", "fleet.example.org.", "-fleet.example.org", "fleet.*.org", "a" * 64, ".".join(["a" * 63] * 4)],
)  # fmt: skip
def test_host_that_no_client_can_call_is_refused(tmp_path, host):
    with pytest.raises(InputError, match="neither a host name nor an IP address"):
        make_server_certificate(tmp_path / "authority", [host])
    assert not (tmp_path / "authority").exists()


def test_authority_that_is_torn_is_refused(tmp_path):
    make_server_certificate(tmp_path, ["localhost"])
    (tmp_path / "ca.crt").write_text("torn", encoding="utf-8")
    with pytest.raises(InputError, match="cannot be used"):
        make_server_certificate(tmp_path, ["localhost"])
    make_server_certificate(tmp_path / "other", ["localhost"])
    (tmp_path / "ca.crt").write_bytes((tmp_path / "other" / "ca.crt").read_bytes())
    with pytest.raises(InputError, match="no pair"):
        make_server_certificate(tmp_path, ["localhost"])

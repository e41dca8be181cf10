"""`mops-fl certificates`: a certificate authority of one's own, the SuperLink's certificate, a SuperNode's keys.

The authority vouches for the SuperLink towards the SuperNodes (TLS); a SuperNode proves with its key that it is the one
that was registered. Private keys are written for their owner's eyes only, and never over others.
"""

import argparse
import ipaddress
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from experiments.durable import PARTIAL, writing
from mops_fl.errors import InputError

AUTHORITY_DAYS = 3650
SERVER_DAYS = 397
AUTHORITY_KEY, AUTHORITY_CERTIFICATE = "ca.key", "ca.crt"
SERVER_KEY, SERVER_CERTIFICATE = "server.key", "server.crt"
_ADVICE = "choose another folder"
_LOOPBACK = ("localhost", "127.0.0.1")  # the SuperLink's own processes, and `flwr run` on its machine
_LABEL = r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)"
# The last label is more than digits: 10.0.0.256 is a mistyped address.
_HOST_NAME = re.compile(rf"(?=.{{1,253}}\Z)(\*\.)?({_LABEL}\.)*(?!\d+\Z){_LABEL}")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `certificates`."""
    kinds = parser.add_subparsers(required=True, metavar="KIND")
    server = kinds.add_parser("server", help="the SuperLink's certificate, and an authority if the folder has none")
    server.add_argument("folder", type=Path, help="where they lie")
    server.add_argument(
        "--host",
        action="append",
        required=True,
        metavar="NAME",
        help="name or IP address by which SuperNodes reach the SuperLink; may be repeated",
    )
    server.add_argument(
        "--days", type=int, default=SERVER_DAYS, help="days that the certificate is valid (default: %(default)s)"
    )
    server.set_defaults(run=_run_server)
    node = kinds.add_parser("node", help="a SuperNode's key pair, to be made on the SuperNode's machine")
    node.add_argument("folder", type=Path, help="where it shall lie")
    node.add_argument("name", help="what the files are called: NAME and NAME.pub")
    node.set_defaults(run=_run_node)


def make_server_certificate(folder: Path, hosts: Sequence[str], days: int = SERVER_DAYS) -> None:
    """Write `server.key` and `server.crt`, signed by the folder's authority, which is made if there is none.

    An older pair is replaced: so a certificate is renewed. Bad input writes nothing.

    Args:
        folder: made if need be.
        hosts: DNS names and IP addresses that the certificate is good for, beside this machine's own.
        days: how long it is valid.

    Raises:
        InputError: a host is no name or address, `days` is not positive or more than the authority has left, the
            folder cannot be written, or its authority cannot be used.
    """
    if days < 1:
        raise InputError(f"--days is {days}; it must be at least 1.")
    names = x509.SubjectAlternativeName([_general_name(host) for host in dict.fromkeys([*hosts, *_LOOPBACK])])
    with writing(folder, _ADVICE, InputError):
        is_new = not _has_authority(folder)
    authority_key, authority = _new_authority() if is_new else _load_authority(folder)
    _require_lasting(authority, days)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _certificate("mops-fl SuperLink", key.public_key(), authority.subject, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(names, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    with writing(folder, _ADVICE, InputError):
        folder.mkdir(parents=True, exist_ok=True)
        if is_new:
            public = authority.public_bytes(Encoding.PEM)
            _write_pair(folder / AUTHORITY_KEY, _pem(authority_key), folder / AUTHORITY_CERTIFICATE, public)
        public = certificate.public_bytes(Encoding.PEM)
        _replace_pair(folder / SERVER_KEY, _pem(key), folder / SERVER_CERTIFICATE, public)


def make_node_key(folder: Path, name: str) -> None:
    """Write a SuperNode's key pair as OpenSSH does: `NAME`, which is secret, and `NAME.pub`, to be registered.

    Raises:
        InputError: there is one of this name already, even half of it, or the folder cannot be written.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + f" {name}\n".encode()
    with writing(folder, _ADVICE, InputError):
        folder.mkdir(parents=True, exist_ok=True)
        _write_pair(folder / name, private, folder / f"{name}.pub", public)


def _run_server(args: argparse.Namespace) -> int:
    make_server_certificate(args.folder, args.host, args.days)
    folder = args.folder
    print(f"{folder / AUTHORITY_KEY}: keep secret, best on no networked machine")
    print(f"{folder / AUTHORITY_CERTIFICATE}: copy to every SuperNode and to who submits runs")
    print(f"{folder / SERVER_KEY}, {SERVER_CERTIFICATE}: for the SuperLink alone; valid for {args.days} days")
    return 0


def _run_node(args: argparse.Namespace) -> int:
    make_node_key(args.folder, args.name)
    print(f"{args.folder / args.name}: keep secret, on this machine")
    print(f"{args.folder / args.name}.pub: give to who runs the SuperLink, to be registered")
    return 0


def _has_authority(folder: Path) -> bool:
    if (folder / AUTHORITY_KEY).is_file():
        return True
    for name in (AUTHORITY_CERTIFICATE, SERVER_CERTIFICATE):
        if (folder / name).exists():  # SuperNodes that trust it would not trust another authority's
            raise InputError(
                f"{folder} has {name}, but not the {AUTHORITY_KEY} that belongs to it; bring {AUTHORITY_KEY} back, "
                "or use another folder for a new authority."
            )
    return False


def _new_authority() -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mops-fl CA")])
    certificate = (
        _certificate("mops-fl CA", key.public_key(), name, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return key, certificate


def _load_authority(folder: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    try:
        key = load_pem_private_key((folder / AUTHORITY_KEY).read_bytes(), password=None)
        certificate = x509.load_pem_x509_certificate((folder / AUTHORITY_CERTIFICATE).read_bytes())
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"The authority in {folder} cannot be used ({error}); restore {AUTHORITY_KEY} and .crt."
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise InputError(
            f"{AUTHORITY_KEY} and {AUTHORITY_CERTIFICATE} in {folder} are no pair of ours; use another folder."
        )
    return key, certificate


def _require_lasting(authority: x509.Certificate, days: int) -> None:
    end = authority.not_valid_after_utc
    left = (end - datetime.now(UTC)).days
    if days > left:
        advice = f"give at most {left} days" if left > 0 else "make a new one in another folder"
        raise InputError(f"--days is {days}, but the authority itself lasts until {end:%Y-%m-%d}; {advice}.")


def _certificate(name: str, key: ec.EllipticCurvePublicKey, issuer: x509.Name, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))  # clocks differ
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(**used: bool) -> x509.KeyUsage:
    usages = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**{usage: used.get(usage, False) for usage in usages})


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not _HOST_NAME.fullmatch(host):
        raise InputError(
            f"--host {host!r} is neither a host name nor an IP address; write it without scheme, port, mask or blank, "
            "and letters beyond a to z in their xn-- form."
        )
    return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _replace_pair(private: Path, secret: bytes, public: Path, content: bytes) -> None:
    """Put a pair in the place of an older one, which stays until both are written."""
    new_private, new_public = (path.with_name(path.name + PARTIAL) for path in (private, public))
    new_private.unlink(missing_ok=True)
    new_public.unlink(missing_ok=True)
    _write_pair(new_private, secret, new_public, content)
    new_private.replace(private)
    new_public.replace(public)


def _write_pair(private: Path, secret: bytes, public: Path, content: bytes) -> None:
    """Write two files that are not there yet, or neither; the private one is its owner's alone."""
    written: list[Path] = []
    try:
        for path, text, mode in ((public, content, 0o644), (private, secret, 0o600)):
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                written.append(path)
                file.write(text)
    except OSError as error:
        for path in written:
            path.unlink()
        if isinstance(error, FileExistsError):
            raise InputError(
                f"{error.filename} is there already, and keys are never replaced; choose another name."
            ) from error
        raise

"""Certificates of a made-up authority, for servers on 127.0.0.1 and for clients."""

from __future__ import annotations

import ssl
from pathlib import Path

import trustme

from penstock.credentials import ServerTls, client_context


class Certs:
    """PEM files: `ca`; `cert` and `key` of a server on 127.0.0.1 and localhost; `client` of a client, with
    its key in the same file.
    """

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        server = authority.issue_cert("127.0.0.1", "localhost")
        self.ca, self.cert, self.key = folder / "ca.pem", folder / "cert.pem", folder / "key.pem"
        self.client = folder / "client.pem"
        authority.cert_pem.write_to_path(self.ca)
        server.private_key_pem.write_to_path(self.key)
        for i, blob in enumerate(server.cert_chain_pems):
            blob.write_to_path(self.cert, append=i > 0)
        authority.issue_cert("client@example.org").private_key_and_cert_chain_pem.write_to_path(self.client)

    def tls(self, **more: object) -> ServerTls:
        """The settings of a server."""
        return ServerTls(self.cert, self.key, **more)  # type: ignore[arg-type]

    def context(self, *, client: bool = False) -> ssl.SSLContext:
        """A client's context that trusts the authority; with `client`, it shows the certificate."""
        return client_context(self.ca, self.client if client else None)

"""A server of this process on a free local port, for as long as a block lasts."""

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from socketserver import BaseRequestHandler, ThreadingTCPServer


@contextmanager
def local_server(handler: type[BaseRequestHandler], tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """URL of the server whose connections `handler` answers, each in a thread of its own."""
    server = ThreadingTCPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True  # a connection that its client keeps open does not hold up the end
    url = f"http://127.0.0.1:{server.server_address[1]}"
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
        url = f"https://localhost:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield url
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

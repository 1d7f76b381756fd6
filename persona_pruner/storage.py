"""Objects under a prefix: a local directory, or a bucket of any S3-compatible server.

Writes are atomic on both. `put_if_absent` decides races: of several writers exactly one sees True. Everything that
goes wrong is a StorageError of one line; transient faults are retried until `storage.deadline_seconds` have passed.
Credentials, region and endpoint come from the standard AWS places (environment, profile, instance role) only.
"""

import base64
import contextlib
import errno
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import urlparse

from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from persona_pruner.config import StorageConfig
from persona_pruner.errors import StorageError

DEFAULTS = StorageConfig()
T = TypeVar("T")
MULTIPART_BYTES = 64 * 2**20
PROBE_SECONDS = 8.0


class NotFoundError(StorageError):
    """There is no object under this key."""


class _Transient(StorageError):
    """Worth another try before the deadline."""


class ObjectInfo(NamedTuple):
    key: str
    size: int
    modified: float
    """Unix seconds."""


class Storage(Protocol):
    """Keys are relative, with "/" between their parts. Instances can be pickled and shared by threads."""

    url: str

    def get(self, key: str) -> bytes:
        """The whole object, verified where it was stored with its sha256. Raises NotFoundError."""

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Bytes [start, start + length), fewer where the object ends. Raises NotFoundError."""

    def put(self, key: str, data: bytes) -> None:
        """Store atomically, over whatever is there."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Store atomically if nothing is there. False: another object is."""

    def exists(self, key: str) -> bool: ...

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects whose key begins with `prefix`, in order of their keys, fetched page by page."""

    def delete(self, key: str) -> None:
        """Remove; it is fine if nothing is there."""

    def probe(self) -> None:
        """Raise StorageError within seconds if this place cannot be read and written. Leaves nothing behind."""


def open_storage(url: str | Path, config: StorageConfig = DEFAULTS) -> Storage:
    """Storage below s3://bucket/prefix or a local directory (made with the first object)."""
    text = str(url)
    if text.startswith("s3://"):
        parsed = urlparse(text)
        if not parsed.netloc:
            raise StorageError(f"{text}: no bucket; write s3://bucket/prefix")
        return S3Storage(parsed.netloc, parsed.path.strip("/"), config)
    if "://" in text:
        raise StorageError(f"{text}: unknown kind of storage; use a local directory or s3://bucket/prefix")
    return LocalStorage(Path(text).absolute(), config)


def read_url(url: str, config: StorageConfig = DEFAULTS) -> bytes:
    """A local file or an s3:// object. Raises NotFoundError, StorageError."""
    if url.startswith("s3://"):
        parent, _, name = url.rpartition("/")
        return open_storage(parent, config).get(name)
    try:
        return Path(url).read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"{url}: no such file") from None
    except OSError as error:
        raise StorageError(f"{url}: cannot be read: {error.strerror}") from None


def local_copy(url: str, cache: Path | None = None) -> Path:
    """A local path with the content of an s3:// object or prefix; a local path comes back as it is.

    The copy is named by keys, sizes and times of what it holds, so that a changed source is fetched anew.
    """
    if not url.startswith("s3://"):
        return Path(url)
    bucket, _, key = url.removeprefix("s3://").rstrip("/").partition("/")
    source = open_storage(f"s3://{bucket}")
    found = [o for o in source.list(key) if o.size and (o.key == key or o.key.startswith(f"{key}/"))]
    if not found:
        raise NotFoundError(f"{url}: nothing is there")
    version = hashlib.sha256(repr((url, found)).encode()).hexdigest()[:16]
    root = (cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "persona-pruner") / version
    copy = LocalStorage(root, StorageConfig())
    for item in found:
        name = Path(item.key).name if item.key == key else item.key.removeprefix(f"{key}/")
        check_key(name)
        if not copy.exists(name):
            copy.put(name, source.get(item.key))
    return root / Path(key).name if found[0].key == key else root


def check_key(key: str) -> None:
    """Raise StorageError unless `key` stays below its prefix on every implementation."""
    parts = key.split("/")
    if not key or "\\" in key or any(ord(c) < 32 for c in key) or any(part in ("", ".", "..") for part in parts):
        raise StorageError(f"key {key!r} would leave its prefix or cannot be stored")


def _until_deadline(seconds: float, call: Callable[[], T]) -> T:
    retrying = Retrying(
        retry=retry_if_exception(lambda error: isinstance(error, _Transient)),
        wait=wait_random_exponential(multiplier=0.1, max=3),
        stop=stop_after_delay(seconds),
        reraise=True,
    )
    return retrying(call)


class LocalStorage:
    def __init__(self, root: Path, config: StorageConfig) -> None:
        self.root = root
        self.url = str(root)
        self._seconds = config.deadline_seconds

    def _path(self, key: str) -> Path:
        check_key(key)
        return self.root / key

    def _try(self, key: str, call: Callable[[], T]) -> T:
        def once() -> T:
            try:
                return call()
            except (FileNotFoundError, NotADirectoryError):
                raise NotFoundError(f"{self.url}/{key}: no such object") from None
            except OSError as error:
                kind = _Transient if error.errno in (errno.ENOSPC, errno.EIO, errno.ESTALE) else StorageError
                raise kind(f"{self.url}/{key}: {error.strerror}") from None

        return _until_deadline(self._seconds, once)

    def get(self, key: str) -> bytes:
        return self._try(key, self._path(key).read_bytes)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        def call() -> bytes:
            with self._path(key).open("rb") as file:
                file.seek(start)
                return file.read(length)

        return self._try(key, call)

    def put(self, key: str, data: bytes) -> None:
        self._write(key, data, os.replace)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        try:
            self._write(key, data, os.link)
        except FileExistsError:
            return False
        return True

    def _write(self, key: str, data: bytes, publish: Callable[[str, Path], None]) -> None:
        target = self._path(key)

        def call() -> bool:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".part-")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.chmod(temporary, 0o644)
                publish(temporary, target)
            except FileExistsError:
                return False
            finally:
                Path(temporary).unlink(missing_ok=True)
            return True

        if not self._try(key, call):
            raise FileExistsError(key)

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return self._walk(self.root / prefix.rpartition("/")[0], prefix)

    def _walk(self, directory: Path, prefix: str) -> Iterator[ObjectInfo]:
        try:
            entries = sorted(os.scandir(directory), key=lambda e: f"{e.name}/" if e.is_dir() else e.name)
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            key = Path(entry.path).relative_to(self.root).as_posix()
            if entry.is_dir():
                if f"{key}/".startswith(prefix) or prefix.startswith(f"{key}/"):
                    yield from self._walk(Path(entry.path), prefix)
            elif key.startswith(prefix) and not entry.name.startswith(".part-"):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    yield ObjectInfo(key, status.st_size, status.st_mtime)

    def delete(self, key: str) -> None:
        path = self._path(key)
        path.unlink(missing_ok=True)
        for parent in path.parents:
            if parent == self.root:
                break
            try:
                parent.rmdir()
            except OSError:
                break

    def probe(self) -> None:
        existing = self.root
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        if not existing.is_dir():
            raise StorageError(f"{self.url}: cannot be written: {existing} is no directory")
        try:
            handle, temporary = tempfile.mkstemp(dir=existing, prefix=".part-")
            os.close(handle)
            os.unlink(temporary)
        except OSError as error:
            raise StorageError(f"{self.url}: cannot be written: {error.strerror}") from None


class S3Storage:
    """Plain single puts, conditional ones by `If-None-Match: *`. sha256 of the content travels as user metadata and is
    checked on every whole read, Content-MD5 makes the server check what it stores."""

    def __init__(self, bucket: str, prefix: str, config: StorageConfig) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self.config = config
        self._lock = threading.Lock()
        self._made: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Storage, (self.bucket, self.prefix.rstrip("/"), self.config)

    @property
    def client(self) -> Any:
        with self._lock:
            if self._made is None:
                import boto3
                from botocore.config import Config
                from botocore.exceptions import BotoCoreError

                # Several S3-compatible servers answer 411 to the trailing checksums that newer SDKs add by default.
                os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
                custom = bool(os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL_S3"))
                options = Config(
                    connect_timeout=5,
                    read_timeout=20,
                    max_pool_connections=self.config.connections,
                    retries={"total_max_attempts": 1},
                    s3={"addressing_style": "path"} if custom else None,
                )
                try:
                    self._made = boto3.session.Session().client("s3", config=options)
                except (BotoCoreError, ValueError) as error:
                    raise StorageError(f"{self.url}: {error}; check the AWS settings") from None
        return self._made

    def _call(self, key: str, call: Callable[[Any], T], seconds: float | None = None) -> T:
        from botocore.exceptions import BotoCoreError, ClientError

        client = self.client

        def once() -> T:
            try:
                return call(client)
            except (ClientError, BotoCoreError, OSError) as error:
                raise self._explain(key, error) from None

        return _until_deadline(self.config.deadline_seconds if seconds is None else seconds, once)

    def _explain(self, key: str, error: Exception) -> StorageError:
        """One line for what went wrong and what to check."""
        from botocore import exceptions as known

        place = f"{self.url}/{key}" if key else self.url
        response = getattr(error, "response", {})
        code = str(response.get("Error", {}).get("Code", ""))
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        advice = {
            "NoSuchBucket": f"bucket {self.bucket} does not exist; create it or check its name",
            "InvalidAccessKeyId": "the access key is unknown to the server; check AWS_ACCESS_KEY_ID",
            "SignatureDoesNotMatch": "the secret key does not fit; check AWS_SECRET_ACCESS_KEY",
            "AccessDenied": "permission denied; check the policy of these credentials (cluster/policies/)",
            "403": "permission denied; check the credentials and their policy (cluster/policies/)",
            "RequestTimeTooSkewed": "the clock of this machine is wrong; synchronise it",
            "ExpiredToken": "the credentials have expired; renew them",
            "PermanentRedirect": "the bucket is in another region; check AWS_REGION",
        }.get(code)
        if code in ("NoSuchKey", "404", "NotFound"):
            return NotFoundError(f"{place}: no such object")
        if advice:
            return StorageError(f"{place}: {advice}")
        if isinstance(error, known.NoCredentialsError | known.PartialCredentialsError):
            return StorageError(f"{place}: no AWS credentials; set AWS_ACCESS_KEY_ID and so on, a profile, or a role")
        if isinstance(error, known.SSLError):
            return StorageError(f"{place}: TLS failed: check the certificate of the endpoint or AWS_CA_BUNDLE")
        if isinstance(error, known.EndpointConnectionError | known.ConnectTimeoutError | known.ProxyConnectionError):
            return _Transient(f"{place}: no server answers at {self._endpoint()}; check AWS_ENDPOINT_URL")
        if status in (400, 405, 411, 501) and code:
            return StorageError(f"{place}: the server refused the request: {code}")
        return _Transient(f"{place}: {code or type(error).__name__}{f' (HTTP {status})' if status else ''}")

    def _endpoint(self) -> str:
        return str(self.client.meta.endpoint_url)

    def _encryption(self) -> dict[str, str]:
        values = {"ServerSideEncryption": self.config.server_side_encryption, "SSEKMSKeyId": self.config.kms_key_id}
        return {name: value for name, value in values.items() if value}

    def _name(self, key: str) -> str:
        check_key(key)
        return self.prefix + key

    def get(self, key: str) -> bytes:
        name = self._name(key)

        def call(client: Any) -> bytes:
            answer = client.get_object(Bucket=self.bucket, Key=name)
            data = answer["Body"].read()
            if len(data) != answer["ContentLength"]:
                raise _Transient(f"{self.url}/{key}: {len(data)} of {answer['ContentLength']} bytes came")
            expected = answer.get("Metadata", {}).get("sha256")
            if expected and hashlib.sha256(data).hexdigest() != expected:
                raise _Transient(f"{self.url}/{key}: content does not match the sha256 it was stored with")
            return data

        return self._call(key, call)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        name = self._name(key)
        span = f"bytes={start}-{start + length - 1}"
        return self._call(key, lambda c: c.get_object(Bucket=self.bucket, Key=name, Range=span)["Body"].read())

    def _arguments(self, key: str, data: bytes) -> dict[str, Any]:
        return {
            "Bucket": self.bucket,
            "Key": self._name(key),
            "Body": data,
            "ContentMD5": base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode(),
            "Metadata": {"sha256": hashlib.sha256(data).hexdigest()},
            **self._encryption(),
        }

    def put(self, key: str, data: bytes) -> None:
        if len(data) > MULTIPART_BYTES:
            return self._put_parts(key, data)
        arguments = self._arguments(key, data)
        self._call(key, lambda client: client.put_object(**arguments))

    def _put_parts(self, key: str, data: bytes) -> None:
        """boto3's transfer manager: parts in parallel, aborted when one fails."""
        import io

        from boto3.exceptions import S3UploadFailedError

        extra = {"Metadata": {"sha256": hashlib.sha256(data).hexdigest()}, **self._encryption()}

        def call(client: Any) -> None:
            try:
                client.upload_fileobj(io.BytesIO(data), self.bucket, self._name(key), ExtraArgs=extra)
            except S3UploadFailedError as error:
                raise _Transient(f"{self.url}/{key}: {error}") from None

        self._call(key, call)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        from botocore.exceptions import ClientError

        arguments = self._arguments(key, data)

        def call(client: Any) -> bool:
            try:
                client.put_object(**arguments, IfNoneMatch="*")
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] != 412:
                    raise
                return False
            return True

        # A try whose answer was lost may have stored the object: the next one then meets our own bytes.
        return self._call(key, call) or self.get(key) == data

    def exists(self, key: str) -> bool:
        name = self._name(key)
        try:
            self._call(key, lambda client: client.head_object(Bucket=self.bucket, Key=name))
        except NotFoundError:
            return False
        return True

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        arguments = {"Bucket": self.bucket, "Prefix": self.prefix + prefix}
        while True:
            page = self._call(prefix, lambda client: client.list_objects_v2(**arguments))
            for item in page.get("Contents", ()):
                key = item["Key"].removeprefix(self.prefix)
                yield ObjectInfo(key, item["Size"], item["LastModified"].timestamp())
            if not page.get("IsTruncated"):
                return
            arguments["ContinuationToken"] = page["NextContinuationToken"]

    def delete(self, key: str) -> None:
        name = self._name(key)
        self._call(key, lambda client: client.delete_object(Bucket=self.bucket, Key=name))

    def probe(self) -> None:
        arguments = self._arguments(".probe", b"")
        self._call("", lambda client: client.list_objects_v2(Bucket=self.bucket, MaxKeys=1), PROBE_SECONDS)
        self._call("", lambda client: client.put_object(**arguments), PROBE_SECONDS)
        self._call("", lambda client: client.delete_object(Bucket=self.bucket, Key=arguments["Key"]), PROBE_SECONDS)

    def share(self, key: str, seconds: int) -> str:
        """A presigned link that reads `key` without credentials for so long."""
        name = self._name(key)
        target = {"Bucket": self.bucket, "Key": name}
        return str(self.client.generate_presigned_url("get_object", Params=target, ExpiresIn=seconds))

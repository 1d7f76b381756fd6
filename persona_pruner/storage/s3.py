"""Objects in a bucket of any S3-compatible server (AWS, MinIO, Ceph), through boto3."""

import base64
import contextlib
import hashlib
import io
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import boto3
from botocore import exceptions as known
from botocore.config import Config
from urllib3.exceptions import HTTPError

from persona_pruner.config.schema import StorageConfig
from persona_pruner.errors import StorageError
from persona_pruner.storage.base import NotFoundError, ObjectInfo, TransientError, check_key, until_deadline
from persona_pruner.storage.s3_errors import explain

T = TypeVar("T")
MULTIPART_BYTES = 64 * 2**20
PROBE_SECONDS = 4.0
CONNECT_SECONDS = 5
SILENCE_SECONDS = 10
"""A server that sends nothing for so long counts as gone."""

log = logging.getLogger(__name__)


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
        self._conditional: bool | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Storage, (self.bucket, self.prefix.rstrip("/"), self.config)

    @property
    def client(self) -> Any:
        with self._lock:
            if self._made is None:
                # Several S3-compatible servers answer 411 to the trailing checksums that newer SDKs, pyarrow's
                # included, add by default.
                os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
                options = Config(
                    connect_timeout=CONNECT_SECONDS,
                    read_timeout=SILENCE_SECONDS,
                    max_pool_connections=self.config.connections,
                    retries={"total_max_attempts": 1},
                )
                by_path = options.merge(Config(s3={"addressing_style": "path"}))
                try:
                    session = boto3.session.Session()
                    made = session.client("s3", config=options)
                    amazon = "amazonaws.com" in made.meta.endpoint_url
                    self._made = made if amazon else session.client("s3", config=by_path)
                except (known.BotoCoreError, ValueError) as error:
                    raise StorageError(f"{self.url}: {error}; check the AWS settings") from None
        return self._made

    def _call(self, key: str, call: Callable[[Any], T], seconds: float | None = None) -> T:
        limit = self.config.deadline_seconds if seconds is None else seconds
        end = time.monotonic() + limit

        def once() -> T:
            try:
                # One second more, so that whoever watches the deadline itself can say better what came.
                return _bounded(lambda: call(self.client), max(end - time.monotonic(), 0) + 1)
            except (known.ClientError, known.BotoCoreError, HTTPError, OSError) as error:
                raise explain(error, self.url, key, self._endpoint()) from None

        return until_deadline(limit, once)

    def _endpoint(self) -> str:
        return str(self._made.meta.endpoint_url) if self._made else "the server"

    def _encryption(self) -> dict[str, str]:
        values = {"ServerSideEncryption": self.config.server_side_encryption, "SSEKMSKeyId": self.config.kms_key_id}
        return {name: value for name, value in values.items() if value}

    def _name(self, key: str) -> str:
        check_key(key)
        return self.prefix + key

    def get(self, key: str) -> bytes:
        name = self._name(key)
        end = time.monotonic() + self.config.deadline_seconds

        def call(client: Any) -> bytes:
            answer = client.get_object(Bucket=self.bucket, Key=name)
            data = self._body(answer, key, end)
            expected = answer.get("Metadata", {}).get("sha256")
            if expected and hashlib.sha256(data).hexdigest() != expected:
                raise TransientError(f"{self.url}/{key}: content does not match the sha256 it was stored with")
            return data

        return self._call(key, call)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        name = self._name(key)
        end = time.monotonic() + self.config.deadline_seconds

        def call(client: Any) -> bytes:
            span = f"bytes={start}-{start + max(length, 1) - 1}"
            try:
                answer = client.get_object(Bucket=self.bucket, Key=name, Range=span)
            except known.ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] != 416:
                    raise
                return b""
            return self._body(answer, key, end)[:length]

        return self._call(key, call)

    def _body(self, answer: dict[str, Any], key: str, end: float) -> bytes:
        """Whole body of an answer. Read as it arrives: a server that trickles must not outlive the deadline."""
        data = bytearray()
        with answer["Body"] as stream:
            while len(data) < answer["ContentLength"] and (part := stream.read1(2**20)):
                data += part
                if time.monotonic() > end:
                    stream.close()
                    break
        if len(data) != answer["ContentLength"]:
            raise TransientError(f"{self.url}/{key}: {len(data)} of {answer['ContentLength']} bytes came")
        return bytes(data)

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
            # boto3's transfer manager: parts in parallel, aborted when one fails.
            extra = {"Metadata": {"sha256": hashlib.sha256(data).hexdigest()}, **self._encryption()}
            name = self._name(key)
            self._call(key, lambda client: client.upload_fileobj(io.BytesIO(data), self.bucket, name, ExtraArgs=extra))
            return
        arguments = self._arguments(key, data)
        self._call(key, lambda client: client.put_object(**arguments))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        if not self.honours_conditions():
            return self._put_if_unseen(key, data)
        arguments = self._arguments(key, data)
        # A try whose answer was lost may have stored the object: the next one then meets our own bytes.
        return self._call(key, lambda client: _create(client, arguments)) or self.get(key) == data

    def _put_if_unseen(self, key: str, data: bytes) -> bool:
        """Best effort where the server knows no conditions: of writers within a second the last one wins."""
        if not self.exists(key):
            self.put(key, data)
            time.sleep(1)
        return self.get(key) == data

    def honours_conditions(self) -> bool:
        """Whether the server refuses `If-None-Match: *` on an object that is there; tried once in a process."""
        if self._conditional is None:
            key = f".probe-{uuid.uuid4().hex}"
            arguments = self._arguments(key, b"2")
            self.put(key, b"1")
            try:
                # Two tries see the same: the first one's answer may be lost, its effect is then met by the second.
                self._conditional = not self._call(key, lambda client: _create(client, arguments))
            except StorageError as error:
                if "NotImplemented" not in str(error):
                    raise
                self._conditional = False
            finally:
                self.delete(key)
            if not self._conditional:
                log.warning(
                    "%s: the server ignores If-None-Match; of two jobs that start on this output within a second both "
                    "may run. Start one at a time, or use a server that knows conditional writes",
                    self.url,
                )
        return self._conditional

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

    def match(self, *patterns: str) -> Iterator[ObjectInfo]:
        wanted = re.compile("|".join(re.escape(pattern).replace(r"\*", "[^/]+") for pattern in patterns))
        prefix = os.path.commonpath(patterns).partition("*")[0]
        return (item for item in self.list(prefix) if wanted.fullmatch(item.key))

    def delete(self, key: str) -> None:
        name = self._name(key)
        self._call(key, lambda client: client.delete_object(Bucket=self.bucket, Key=name))

    def check_readable(self, prefix: str = "") -> None:
        arguments = {"Bucket": self.bucket, "Prefix": self.prefix + prefix, "MaxKeys": 1}
        self._call("", lambda client: client.list_objects_v2(**arguments), PROBE_SECONDS)

    def check_writable(self) -> None:
        arguments = self._arguments(".probe", b"")
        self.check_readable()
        self._call("", lambda client: client.put_object(**arguments), PROBE_SECONDS)
        self._call("", lambda client: client.delete_object(Bucket=self.bucket, Key=arguments["Key"]), PROBE_SECONDS)
        self.honours_conditions()

    def incomplete_writes(self, before: float, remove: bool = False) -> Sequence[str]:
        def call(client: Any) -> Sequence[str]:
            pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=self.prefix)
            found = [u for page in pages for u in page.get("Uploads", ()) if u["Initiated"].timestamp() < before]
            for upload in found if remove else ():
                with contextlib.suppress(client.exceptions.NoSuchUpload):
                    client.abort_multipart_upload(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])
            return [upload["Key"].removeprefix(self.prefix) for upload in found]

        return self._call("", call)

    def share(self, key: str, seconds: int) -> str:
        target = {"Bucket": self.bucket, "Key": self._name(key)}
        return str(self.client.generate_presigned_url("get_object", Params=target, ExpiresIn=seconds))


def _bounded(call: Callable[[], T], seconds: float) -> T:
    """What `call` gives; TimeoutError after `seconds`. It runs in a thread of its own, which is then left to itself:
    no timeout of a socket ends a server that sends a byte of its headers now and then."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, name="s3", daemon=True).start()
    return answer.result(seconds)


def _create(client: Any, arguments: dict[str, Any]) -> bool:
    try:
        client.put_object(**arguments, IfNoneMatch="*")
    except known.ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] != 412:
            raise
        return False
    return True

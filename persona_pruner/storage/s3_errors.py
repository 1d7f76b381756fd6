"""What the errors of boto3 mean to whoever configured the storage."""

from botocore import exceptions as known

from persona_pruner.errors import StorageError
from persona_pruner.storage.base import NotFoundError, TransientError

ADVICE = {
    "InvalidAccessKeyId": "the access key is unknown to the server; check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret key does not fit; check AWS_SECRET_ACCESS_KEY",
    "AccessDenied": "permission denied; check the policy of these credentials (cluster/policies/)",
    "403": "permission denied; check the credentials and their policy (cluster/policies/)",
    "RequestTimeTooSkewed": "the clock of this machine is wrong; synchronise it",
    "ExpiredToken": "the credentials have expired; renew them",
    "PermanentRedirect": "the bucket is in another region; check AWS_REGION",
}
DAMAGED_ON_THE_WAY = {"BadDigest", "XAmzContentSHA256Mismatch", "RequestTimeout", "IncompleteBody"}
NO_ANSWER = (
    known.EndpointConnectionError,
    known.ConnectTimeoutError,
    known.ReadTimeoutError,
    known.ProxyConnectionError,
    TimeoutError,
)


def explain(error: Exception, url: str, key: str, endpoint: str) -> StorageError:
    """One line for what went wrong with `key` below `url`, or with all of it where `key` is empty, and what to check.

    A TransientError may pass when the call is made again; a NotFoundError says that the object is not there.
    """
    place = f"{url}/{key}" if key else url
    response = getattr(error, "response", None) or {}
    code = str(response.get("Error", {}).get("Code", ""))
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code == "NoSuchBucket":
        bucket = url.removeprefix("s3://").partition("/")[0]
        return StorageError(f"{place}: bucket {bucket} does not exist; create it or check its name")
    if key and code in ("NoSuchKey", "404", "NotFound"):
        return NotFoundError(f"{place}: no such object")
    if code in ADVICE:
        return StorageError(f"{place}: {ADVICE[code]}")
    if isinstance(error, known.NoCredentialsError | known.PartialCredentialsError):
        return StorageError(f"{place}: no AWS credentials; set AWS_ACCESS_KEY_ID and so on, a profile, or a role")
    if isinstance(error, known.SSLError):
        return StorageError(f"{place}: TLS failed: check the certificate of the endpoint or AWS_CA_BUNDLE")
    if isinstance(error, known.ParamValidationError):
        return StorageError(f"{place}: {' '.join(str(error).split())}")
    if isinstance(error, NO_ANSWER):
        return TransientError(f"{place}: no server answers at {endpoint}; check AWS_ENDPOINT_URL")
    if code == "404":
        return StorageError(f"{place}: {endpoint} is no S3 server (HTTP 404); check AWS_ENDPOINT_URL")
    if code not in DAMAGED_ON_THE_WAY and 400 <= status < 500 and status not in (408, 409, 425, 429):
        return StorageError(f"{place}: the server refused the request: {code} (HTTP {status})")
    if not status:
        return TransientError(f"{place}: {type(error).__name__} at {endpoint}; check AWS_ENDPOINT_URL")
    return TransientError(f"{place}: {code} (HTTP {status})")

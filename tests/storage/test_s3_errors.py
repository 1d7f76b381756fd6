import pytest
from botocore import exceptions as known

from persona_pruner.errors import StorageError
from persona_pruner.storage.base import NotFoundError, TransientError
from persona_pruner.storage.s3_errors import explain

ENDPOINT = "http://minio:9000"


def answer(code, status):
    """The server's own refusal, as boto3 raises it."""
    return known.ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (answer("NoSuchBucket", 404), StorageError, "bucket data does not exist; create it"),
        (answer("NoSuchKey", 404), NotFoundError, "no such object"),
        (answer("AccessDenied", 403), StorageError, "permission denied"),
        (answer("InvalidAccessKeyId", 403), StorageError, "check AWS_ACCESS_KEY_ID"),
        (answer("SignatureDoesNotMatch", 403), StorageError, "check AWS_SECRET_ACCESS_KEY"),
        (answer("PermanentRedirect", 301), StorageError, "check AWS_REGION"),
        (answer("InvalidArgument", 400), StorageError, "refused the request: InvalidArgument (HTTP 400)"),
        (known.NoCredentialsError(), StorageError, "set AWS_ACCESS_KEY_ID"),
        (known.SSLError(endpoint_url=ENDPOINT, error="self-signed"), StorageError, "check the certificate"),
        (known.EndpointConnectionError(endpoint_url=ENDPOINT), TransientError, f"no server answers at {ENDPOINT}"),
        (TimeoutError(), TransientError, f"no server answers at {ENDPOINT}"),
        (ConnectionResetError(), TransientError, f"ConnectionResetError at {ENDPOINT}"),
        (answer("SlowDown", 503), TransientError, "SlowDown (HTTP 503)"),
        (answer("TooManyRequests", 429), TransientError, "TooManyRequests (HTTP 429)"),
        (answer("BadDigest", 400), TransientError, "BadDigest (HTTP 400)"),
    ],
)
def test_an_error_is_one_line_with_its_place_and_what_to_check(error, kind, told):
    found = explain(error, "s3://data/run", "masks/a", ENDPOINT)
    assert type(found) is kind, "only what may pass is tried again"
    assert str(found).startswith("s3://data/run/masks/a: ")
    assert told in str(found)
    assert "\n" not in str(found)


def test_a_listing_that_is_not_found_means_that_this_is_no_s3_server():
    found = explain(answer("404", 404), "s3://data/run", "", ENDPOINT)
    assert type(found) is StorageError
    assert str(found) == f"s3://data/run: {ENDPOINT} is no S3 server (HTTP 404); check AWS_ENDPOINT_URL"

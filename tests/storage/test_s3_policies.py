"""The shipped policies, put on buckets of real S3 servers: what each lets a user do, and what not."""

import json
from pathlib import Path

import boto3
import pytest
from mask_examples import mask
from s3_server import new_bucket, second_user

from persona_pruner.config.schema import StorageConfig
from persona_pruner.errors import StorageError
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage
from persona_pruner.storage.s3 import S3Storage

POLICIES = Path(__file__).parents[2] / "cluster" / "policies"
FAST = StorageConfig(deadline_seconds=2.0)
pytestmark = pytest.mark.cluster


@pytest.fixture
def roles(server):
    """owner's storage, and a function that gives the storage of a user under one of the shipped policies."""
    credentials, arn = second_user(server)
    bucket = new_bucket(server)
    owner = open_storage(f"s3://{bucket}/team/run")
    owner.put(keys.mask("ada"), mask("ada").to_bytes())
    owner.put(keys.checkpoint("bo"), b"x")
    open_storage(f"s3://{bucket}/elsewhere").put("private", b"x")

    def under(name: str) -> S3Storage:
        text = (POLICIES / f"{name}.json").read_text().replace("BUCKET", bucket).replace("PREFIX", "team/run")
        policy = json.loads(text)
        for statement in policy["Statement"]:
            statement["Principal"] = {"AWS": [arn]}
        owner.client.put_bucket_policy(Bucket=bucket, Policy=json.dumps(policy))
        storage = S3Storage(bucket, "team/run", FAST)
        storage._made = boto3.client(
            "s3", endpoint_url=server["AWS_ENDPOINT_URL"], region_name="us-east-1", **credentials
        )
        return storage

    return under


def denied(call, *arguments):
    with pytest.raises(StorageError, match="permission denied"):
        call(*arguments)


def test_reader_policy_reads_masks_and_nothing_else(roles):
    storage = roles("reader")
    storage.check_readable(keys.MASKS)
    assert [item.key for item in storage.list(keys.MASKS)] == [keys.mask("ada")]
    assert storage.get(keys.mask("ada"))
    denied(storage.get, keys.checkpoint("bo"))
    denied(storage.put, keys.mask("ada"), b"x")
    denied(storage.delete, keys.mask("ada"))
    denied(list, storage.list(keys.CHECKPOINTS))


def test_job_policy_works_below_its_prefix_only(roles, large):
    storage = roles("job")
    storage.check_writable()
    storage.put("a", b"x")
    assert storage.put_if_absent("b", b"x")
    storage.put("large", large)
    storage.delete("a")
    outside = S3Storage(storage.bucket, "elsewhere", FAST)
    outside._made = storage.client
    denied(outside.get, "private")
    denied(outside.put, "private", b"x")
    denied(list, outside.list())


def test_admin_policy_cleans_up(roles):
    storage = roles("admin")
    storage.client.create_multipart_upload(Bucket=storage.bucket, Key="team/run/dead")
    assert storage.incomplete_writes(before=4e9, remove=True) == ["dead"]
    storage.delete(keys.checkpoint("bo"))
    with pytest.raises(storage.client.exceptions.ClientError, match="AccessDenied"):
        storage.client.put_bucket_policy(Bucket=storage.bucket, Policy="{}")

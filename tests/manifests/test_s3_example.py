"""The example of S3 as its first lines show it, against a real S3 server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import boto3

ROOT = Path(__file__).parents[2]


def test_plan_with_model_questions_personas_and_output_in_a_bucket(real_s3, example):
    client = boto3.client(
        "s3",
        endpoint_url=real_s3["AWS_ENDPOINT_URL"],
        aws_access_key_id=real_s3["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=real_s3["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    )
    client.create_bucket(Bucket="my-bucket")
    for file in (example / "backbone").iterdir():
        client.upload_file(str(file), "my-bucket", f"backbone/{file.name}")
    client.upload_file(str(example / "personas.jsonl"), "my-bucket", "personas.jsonl")
    client.upload_file(str(example / "instructions.jsonl"), "my-bucket", "questions.jsonl")
    words = ["plan", "s3://my-bucket/personas.jsonl", "--config", "manifests/s3.yaml", "--output", "s3://my-bucket/run"]
    done = subprocess.run(
        [sys.executable, "-c", "from persona_pruner.cli import main; main()", *words, "--json"],
        cwd=ROOT, env=os.environ | real_s3, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["to_synthesize"] == 24
    assert client.list_objects_v2(Bucket="my-bucket", Prefix="run")["KeyCount"] == 0

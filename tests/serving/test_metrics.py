from persona_pruner.serving.metrics import BUCKETS, Metrics, bucket_of


def test_thousands_of_personas_make_few_labels_and_none_with_a_name():
    metrics = Metrics()
    for number in range(2000):
        metrics.requests.labels(bucket_of(f"persona-{number}"), "200").inc()
    metrics.requests.labels(bucket_of(None), "200").inc()
    lines = metrics.render().decode().splitlines()
    assert len([line for line in lines if line.startswith("persona_pruner_requests_total")]) == BUCKETS + 1
    assert "persona-1" not in "".join(lines)

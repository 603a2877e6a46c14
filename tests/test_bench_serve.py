"""`bench serve`: a server, its clients and the command line in one run, on the tiny model."""

from pipelines.bench import serve


def test_server_and_command_line_are_compared_on_the_same_files(model, checkpoint):
    model.generation_config.update(num_beams=1, max_new_tokens=4)
    model.generation_config.save_pretrained(checkpoint)
    results = serve.measure(str(checkpoint), "cpu", num_requests=12, batch_size=4, repeats=1)
    assert results["same_text"] is True
    assert set(results["by_clients"]) == {"1", "8", "50"}
    assert {"throughput_vs_cli", "p50_s", "p95_s", "peak_rss_bytes"} <= set(results)
    for values in results["by_clients"].values():
        assert values["throughput_vs_cli"] > 0
        assert 0 < values["p50_s"] <= values["p95_s"]
        assert values["peak_rss_bytes"] > 50 << 20

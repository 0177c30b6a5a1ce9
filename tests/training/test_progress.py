import torch

from training import progress


def run(path, steps):
    """A tiny training run that keeps its state at `path`; returns its weights."""
    torch.manual_seed(3)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for step in range(progress.restore(path, {"model": model}, optimizer), steps):
        loss = model(torch.full((1, 3), step + 1.0)).pow(2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.save(path, step + 1, {"model": model}, optimizer)
    return model.weight.detach().clone()


def test_an_interrupted_run_goes_on_where_it_stood(tmp_path):
    unbroken = run(tmp_path / "unbroken.safetensors", 6)
    run(tmp_path / "broken.safetensors", 2)
    assert torch.equal(run(tmp_path / "broken.safetensors", 6), unbroken)


def test_saving_leaves_no_partial_file(tmp_path):
    run(tmp_path / "state.safetensors", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]

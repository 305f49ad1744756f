"""What tests of several files share: one small run on the scenes, and files of the paper's scale."""
import types

import pytest
import torch

import commands
import paper

torch.set_num_threads(1)  # the tensors of the tests are small: threads would only wait for each other


def pytest_collection_finish(session):
    if len(session.items) > 100:  # its first tests need no command
        commands.start_server()


@pytest.fixture(scope="session", autouse=True)
def compiled(request, tmp_path_factory):
    """Commands of a minute in all, begun before the first test, since most tests leave a core free: awaited in test_train.py.

    Of low priority: they shall have what the tests leave.
    """
    at_work = {}
    if any("compil" in item.name for item in request.session.items):
        folder = tmp_path_factory.mktemp("compiled")
        (folder / "losses.py").write_text(commands.COMPILED_LOSSES)
        (folder / "program.py").write_text(commands.COMPILED)
        at_work["losses"] = commands.Command(folder, folder / "losses.py")
        for task in ("pretrain", "vqa"):
            settings = [*commands.TINY, *commands.FEW_LAYERS, "vqa.start=null", "compile=true"]
            at_work[task] = commands.Command(folder, folder / "program.py", task, "--out", folder / task, *settings)
    yield at_work
    for command in at_work.values():
        command.kill()


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run of 60 small steps, by the command as users type it: out, arguments, stdout, stderr."""
    out = str(tmp_path_factory.mktemp("trained"))
    arguments = [*commands.TINY, "log_every_steps=10", "checkpoint_every_steps=30", "eval_every_steps=30",
                 "pretrain.epochs=5", "pretrain.lr=5e-3", "pretrain.warmup_steps=10"]
    result = commands.run(tmp_path_factory.mktemp("output"), "train.py", "pretrain", "--out", out, *arguments)
    assert result.status == 0, result.err
    return types.SimpleNamespace(out=out, arguments=arguments, stdout=result.out, stderr=result.err)


@pytest.fixture(scope="session")
def paper_files(tmp_path_factory):
    """Generated files of scale paper: settings that name them, and albef, weights in the layout of ALBEF.pth."""
    folder = tmp_path_factory.mktemp("paper")
    settings, albef = paper.write_files(folder), str(folder / "ALBEF.pth")
    torch.save({"model": paper.albef_state()}, albef)
    return types.SimpleNamespace(folder=folder, settings=settings, albef=albef)

"""`use_backend` as an object that is used again, and around generators, coroutines and what is no function."""

import asyncio
import threading

import pytest

import rnnfast
from rnnfast.backends.dispatch import setting


def test_one_object_serves_several_times():
    outside, backend = setting(), rnnfast.use_backend("torch")
    with backend:
        assert setting() == "torch"
    assert setting() == outside
    with rnnfast.use_backend("reference"), backend:
        with backend:
            assert setting() == "torch"
        assert setting() == "torch"
    assert setting() == outside
    first, second = backend(setting), backend(setting)
    assert first() == second() == "torch"
    assert setting() == outside


def test_threads_share_an_object():
    outside, backend, seen = setting(), rnnfast.use_backend("torch"), []
    with backend:
        pass
    entered, left = threading.Event(), threading.Event()

    def run():
        with rnnfast.use_backend("reference"):
            with backend:
                entered.set()
                left.wait(10)
                seen.append(setting())
            seen.append(setting())

    thread = threading.Thread(target=run)
    try:
        with backend:
            thread.start()
            entered.wait(10)
        assert setting() == outside
    finally:
        left.set()
        thread.join()
    assert seen == ["torch", "reference"]


def test_it_holds_in_generators_and_coroutines():
    outside = setting()

    @rnnfast.use_backend("torch")
    def generator():
        seen = yield setting()
        return [seen, setting()]

    @rnnfast.use_backend("torch")
    async def coroutine():
        await asyncio.sleep(0)
        return setting()

    async def main():
        return await coroutine(), setting()

    steps = generator()
    assert next(steps) == "torch"
    assert setting() == outside
    with pytest.raises(StopIteration) as stopped:
        steps.send("sent")
    assert stopped.value.value == ["sent", "torch"]
    assert asyncio.run(main()) == ("torch", outside)


async def asynchronous():
    yield setting()


@pytest.mark.parametrize(
    ("what", "says"), [(type("Model", (), {}), "a class"), (3, "int"), (asynchronous, "an asynchronous generator")]
)
def test_what_cannot_be_decorated_is_refused(what, says):
    outside = setting()
    with pytest.raises(TypeError, match=f"use_backend: expected a function to decorate, got {says}"):
        rnnfast.use_backend("torch")(what)
    assert setting() == outside

"""One process at a time; others wait, or are told."""

import threading

from toolkit.storage.locks import locked


def test_who_does_not_wait_is_told_and_who_waits_gets_it(tmp_path):
    path, said = tmp_path / "lock", []
    with locked(path) as held:
        assert held
        with locked(path, wait=False) as other:
            assert not other
        waiter = threading.Thread(target=lambda: said.append(take(path, said)))
        waiter.start()
        while not said:
            pass
    waiter.join()
    assert said == ["waiting", True]


def take(path, said):
    with locked(path, on_wait=lambda: said.append("waiting")) as held:
        return held

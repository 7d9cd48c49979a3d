import os
import subprocess
import sys

from pipeline.locks import Lock

TAKEN = "import sys; from pathlib import Path; from pipeline.locks import Lock; print(Lock(Path(sys.argv[1])).take())"


def taken_elsewhere(path):
    """Whether another process gets the lock."""
    done = subprocess.run([sys.executable, "-c", TAKEN, str(path)], capture_output=True, text=True, check=True)
    return done.stdout.strip() == "True"


def test_lock_is_one_holders(tmp_path):
    lock = Lock(tmp_path / "lock")
    assert lock.take() and not taken_elsewhere(tmp_path / "lock")
    assert not Lock(tmp_path / "lock").take()
    lock.release()
    assert taken_elsewhere(tmp_path / "lock")


def test_folder_can_be_locked(tmp_path):
    lock = Lock(tmp_path)
    assert lock.take() and not taken_elsewhere(tmp_path)
    lock.release()
    assert taken_elsewhere(tmp_path)


def test_lock_ends_with_a_killed_holder(tmp_path):
    hold = TAKEN + "; sys.stdout.flush(); import time; time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / "lock")], stdout=subprocess.PIPE)
    assert holder.stdout.readline().strip() == b"True" and not taken_elsewhere(tmp_path / "lock")
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert taken_elsewhere(tmp_path / "lock")


def test_child_that_was_handed_the_lock_holds_it_beyond_its_parent(tmp_path):
    lock = Lock(tmp_path / "lock")
    lock.take()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock.descriptor])
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)  # not handed it
    lock.release()
    assert not taken_elsewhere(tmp_path / "lock")
    child.communicate(b"\n")
    assert taken_elsewhere(tmp_path / "lock")
    other.communicate(b"\n")


def test_released_descriptor_is_closed(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    lock = Lock(tmp_path / "lock")
    lock.release()
    assert len(os.listdir("/proc/self/fd")) == before

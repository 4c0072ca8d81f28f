"""A store in a bucket: AWS, MinIO, Ceph, SeaweedFS, by the usual AWS environment and profiles.

s3fs gives the session, the client and its event loop. The calls are our own, on that client, because s3fs's files
publish what was written so far when a writer fails, its ranged reads are not verified, and its retries multiply with
botocore's and hide whether a conditional write may have happened.

One layer of retries: a fault that passes (503, 500, 429, reset, stall, broken body) is tried again for `PATIENCE_S`,
or for `FIRST_PATIENCE_S` as long as the server has never answered; then it ends in a StoreError that names the object.
"""

import asyncio
import itertools
import logging
import os
import random
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from botocore import exceptions as boto
from botocore.utils import parse_timestamp
from fsspec.asyn import sync

from storage.backend import ANSWERED, ObjectInfo
from storage.cache import node_cache
from storage.errors import StoreError
from storage.s3_errors import MISSING_CODES, PRECONDITION_CODES, error_code, explain, is_transient

PATIENCE_S = 60.0
FIRST_PATIENCE_S = 8.0
CONNECT_TIMEOUT_S = 3
READ_TIMEOUT_S = float(os.environ.get("NST_S3_READ_TIMEOUT_S", "15"))  # between two packets: ends a stall
BACKOFF_S, LONGEST_BACKOFF_S = 0.1, 5.0
SILENCE_S = 3.0  # a longer trouble is logged
BLOCK_BYTES = 16 << 20
BLOCKS_AHEAD = 3  # memory of one transfer: BLOCKS_AHEAD x BLOCK_BYTES
UPLOAD_PART_BYTES = 16 << 20
UPLOADS_AT_ONCE = 3
MOST_PARTS = 10_000
SMALL_AT_ONCE = 48
DELETES_A_CALL = 1000
UPLOADED = ("artifacts/", "parts/")  # where files go
WRITER = "nst-writer"  # metadata of objects that are created once

log = logging.getLogger("nst.store")
_answered: set[str] = set()  # buckets whose server has answered this process
_inherited: list[Any] = []  # clients of the process before a fork: to close them would harm the connections they share
Result = TypeVar("Result")


class S3Backend:
    """Objects below `s3://bucket/prefix`. Usable from threads and after a fork: each process has its own client."""

    def __init__(self, url: str) -> None:
        self.bucket, self._prefix = split_url(url)
        self.url = f"s3://{self.bucket}/{self._prefix}".rstrip("/")
        self._owner = -1
        self._filesystem: Any = None
        self._connecting: asyncio.Task[Any] | None = None

    def scan(self, prefix: str) -> Iterator[ObjectInfo]:
        """One request for a thousand objects."""
        token: dict[str, str] = {}
        start = self._key(f"{prefix.strip('/')}/") if prefix.strip("/") else self._key("")
        while True:
            page = self._call(
                prefix,
                lambda s3: s3.list_objects_v2(Bucket=self.bucket, Prefix=start, **token),  # noqa: B023
            )
            for found in page.get("Contents", []):
                if not found["Key"].endswith("/"):  # some servers list folders
                    yield self._info(found)
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def stat(self, paths: Sequence[str]) -> list[ObjectInfo | None]:
        """A listing of one name each: unlike HEAD, its errors say what is wrong."""

        async def one(s3: Any, path: str) -> ObjectInfo | None:
            page = await s3.list_objects_v2(Bucket=self.bucket, Prefix=self._key(path), MaxKeys=1)
            found = page.get("Contents", [])
            return self._info(found[0]) if found and found[0]["Key"] == self._key(path) else None

        return self._gather(paths, one)

    def read(self, path: str) -> bytes:
        """A whole object; checked against the server's checksum where it keeps one."""
        (data,) = self._gather([path], self._get)
        return data

    def read_many(self, paths: Sequence[str]) -> list[bytes | None]:
        """Small objects, `SMALL_AT_ONCE` at a time."""

        async def one(s3: Any, path: str) -> bytes | None:
            try:
                return await self._get(s3, path)
            except boto.ClientError as error:
                if error_code(error) in MISSING_CODES:
                    return None
                raise

        return self._gather(paths, one)

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        """A ranged GET; the server's checksum is of the whole object, so the caller has to check the bytes."""
        return self._call(path, lambda s3: self._get(s3, path, offset, size))

    def blocks(self, path: str, size: int, tag: str = "") -> Iterator[bytes]:
        """Ranges read ahead side by side, each tried again by itself."""

        def start(offset: int) -> "Future[bytes]":
            span = min(BLOCK_BYTES, size - offset)
            work = self._retried(path, lambda s3: self._get(s3, path, offset, span, tag))
            return asyncio.run_coroutine_threadsafe(work, self._loop)

        offsets = iter(range(0, size, BLOCK_BYTES))
        ahead = deque(start(offset) for offset in itertools.islice(offsets, BLOCKS_AHEAD))
        try:
            while ahead:
                block = ahead.popleft().result()
                following = next(offsets, None)
                if following is not None:
                    ahead.append(start(following))
                yield block
        finally:
            for request in ahead:
                request.cancel()

    def create(self, path: str, data: bytes) -> bool:
        """One conditional PUT, marked with a token of its own.

        An answer may be lost, and the HTTP library repeats a PUT by itself when a kept connection breaks. So "it exists"
        may mean that we made it: the token tells.
        """
        token = uuid.uuid4().hex
        call = {"Bucket": self.bucket, "Key": self._key(path), "Body": data, "Metadata": {WRITER: token}}

        async def attempt(s3: Any) -> bool:
            try:
                await s3.put_object(**call, IfNoneMatch="*")
                return True
            except boto.ClientError as error:
                if error_code(error) not in PRECONDITION_CODES:
                    raise
            found = await s3.head_object(Bucket=self.bucket, Key=self._key(path))
            return bool(found.get("Metadata", {}).get(WRITER) == token)

        return self._call(path, attempt)

    def replace(self, path: str, data: bytes) -> None:
        """One PUT."""
        self._call(path, lambda s3: s3.put_object(Bucket=self.bucket, Key=self._key(path), Body=data))

    def upload(self, source: Path, path: str) -> None:
        """One PUT, or the parts of a multipart upload side by side: nothing is visible before the last call."""
        sync(self._loop, self._upload, source, path)
        source.unlink()

    def delete(self, paths: Sequence[str]) -> None:
        """A thousand objects a request."""
        for start in range(0, len(paths), DELETES_A_CALL):
            some = paths[start : start + DELETES_A_CALL]
            names = {"Objects": [{"Key": self._key(path)} for path in some], "Quiet": True}
            self._call(some[0], lambda s3: self._delete(s3, names))  # noqa: B023

    def staging(self) -> AbstractContextManager[Path]:
        """A private folder beside this machine's cache."""
        return node_cache().private_folder()

    def leftovers(self) -> Iterator[ObjectInfo]:
        """Multipart uploads that were never completed; their tag is the upload's id."""
        marks: dict[str, str] = {}
        while True:
            page = self._call(
                "",
                lambda s3: s3.list_multipart_uploads(Bucket=self.bucket, Prefix=self._key(""), **marks),  # noqa: B023
            )
            for upload in page.get("Uploads", []):
                path = upload["Key"].removeprefix(self._key(""))
                if not path.startswith(UPLOADED):
                    continue  # another store's or another program's, further down in the bucket
                yield ObjectInfo(path, 0, upload["Initiated"].timestamp(), upload["UploadId"])
            if not page.get("IsTruncated"):
                return
            marks = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def drop_leftovers(self, leftovers: Sequence[ObjectInfo]) -> None:
        """Abort unfinished uploads."""

        async def one(s3: Any, upload: ObjectInfo) -> None:
            with suppress(s3.exceptions.NoSuchUpload):
                await s3.abort_multipart_upload(Bucket=self.bucket, Key=self._key(upload.path), UploadId=upload.tag)

        for upload in leftovers:
            self._call(upload.path, lambda s3: one(s3, upload))  # noqa: B023

    async def _delete(self, s3: Any, names: dict[str, Any]) -> None:
        """One request; an error of a single object is raised as if it were the request's, so that all are tried again."""
        answer = await s3.delete_objects(Bucket=self.bucket, Delete=names)
        for failed in answer.get("Errors", []):
            if failed.get("Code") not in MISSING_CODES:
                message = f"{failed.get('Key')}: {failed.get('Message', '')}"
                raise boto.ClientError({"Error": {"Code": failed.get("Code"), "Message": message}}, "DeleteObjects")

    async def _get(self, s3: Any, path: str, offset: int = 0, size: int | None = None, tag: str = "") -> bytes:
        span = {} if size is None else {"Range": f"bytes={offset}-{offset + size - 1}"}
        unchanged = {"IfMatch": f'"{tag}"'} if tag else {}
        try:
            answer = await s3.get_object(Bucket=self.bucket, Key=self._key(path), **span, **unchanged)
        except boto.ClientError as error:
            if error_code(error) in ("InvalidRange", "416"):
                return b""
            raise
        async with answer["Body"] as body:
            data: bytes = await body.read()
        if len(data) != answer["ContentLength"]:
            raise ConnectionError(f"{len(data)} of {answer['ContentLength']} bytes came")
        return data

    async def _upload(self, source: Path, path: str) -> None:
        size, name = source.stat().st_size, {"Bucket": self.bucket, "Key": self._key(path)}
        if size <= UPLOAD_PART_BYTES:
            data = source.read_bytes()
            await self._retried(path, lambda s3: s3.put_object(**name, Body=data))
            return
        created = await self._retried(path, lambda s3: s3.create_multipart_upload(**name))
        upload = {**name, "UploadId": created["UploadId"]}
        try:
            parts = await self._upload_parts(source, size, path, upload)
            await self._complete(path, size, upload, parts)
        except BaseException:
            with suppress(Exception):
                s3 = await self._client()
                await s3.abort_multipart_upload(**upload)
            raise

    async def _upload_parts(self, source: Path, size: int, path: str, upload: dict[str, Any]) -> list[dict[str, Any]]:
        part_bytes = max(UPLOAD_PART_BYTES, -(-size // MOST_PARTS))
        turn = asyncio.Semaphore(UPLOADS_AT_ONCE)

        async def one(number: int) -> dict[str, Any]:
            async with turn:
                data = await asyncio.to_thread(_read_part, source, number * part_bytes, part_bytes)
                call = {**upload, "PartNumber": number + 1, "Body": data}
                answer = await self._retried(path, lambda s3: s3.upload_part(**call))
            checksums = {name: value for name, value in answer.items() if name.startswith("ChecksumCRC")}
            return {"PartNumber": number + 1, "ETag": answer["ETag"], **checksums}

        tasks = [asyncio.ensure_future(one(number)) for number in range(-(-size // part_bytes))]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _complete(self, path: str, size: int, upload: dict[str, Any], parts: list[dict[str, Any]]) -> None:
        """Complete an upload. A completion whose answer was lost says "no such upload" the next time: look."""

        async def attempt(s3: Any) -> None:
            try:
                await s3.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
            except s3.exceptions.NoSuchUpload:
                page = await s3.list_objects_v2(Bucket=self.bucket, Prefix=upload["Key"], MaxKeys=1)
                if [(found["Key"], found["Size"]) for found in page.get("Contents", [])] != [(upload["Key"], size)]:
                    raise

        await self._retried(path, attempt)

    def _gather(self, paths: Sequence[str], one: Callable[[Any, str], Awaitable[Result]]) -> list[Result]:
        """`one` of each path, `SMALL_AT_ONCE` at a time, each tried again by itself."""

        async def work() -> list[Result]:
            turn = asyncio.Semaphore(SMALL_AT_ONCE)

            async def guarded(path: str) -> Result:
                async with turn:
                    return await self._retried(path, lambda s3: one(s3, path))

            return list(await asyncio.gather(*(guarded(path) for path in paths)))

        return sync(self._loop, work)

    def _call(self, path: str, attempt: Callable[[Any], Awaitable[Result]]) -> Result:
        return sync(self._loop, self._retried, path, attempt)

    async def _retried(self, path: str, attempt: Callable[[Any], Awaitable[Result]]) -> Result:
        """The one place where a request is tried again."""
        began = time.monotonic()
        for number in itertools.count():
            try:
                result = await attempt(await self._client())
                _answered.add(self.bucket)
                return result
            except Exception as error:
                waited = time.monotonic() - began
                known = self.bucket in _answered or os.environ.get(ANSWERED) is not None
                patience = PATIENCE_S if known else FIRST_PATIENCE_S
                pause = min(LONGEST_BACKOFF_S, BACKOFF_S * 2**number) * random.uniform(0.5, 1.0)
                if not isinstance(error, boto.BotoCoreError | boto.ClientError | OSError) and not is_transient(error):
                    raise
                if error_code(error) and not is_transient(error):
                    _answered.add(self.bucket)
                if not is_transient(error) or waited + pause > patience:
                    tried = f", tried {number + 1} times in {waited:.0f} s" if is_transient(error) else ""
                    raise explain(self.url, path, error, tried) from (None if error_code(error) else error)
                if waited > SILENCE_S:
                    log.warning("%s; trying again", explain(self.url, path, error))
            await asyncio.sleep(pause)
        raise AssertionError("unreachable")

    async def _client(self) -> Any:
        """The client of this process, made once; whoever comes meanwhile waits for it."""
        if self._connecting is None:
            self._connecting = asyncio.ensure_future(self._connect())
        try:
            return await asyncio.shield(self._connecting)
        except Exception:
            self._connecting = None
            raise

    async def _connect(self) -> Any:
        """Path-style addressing anywhere but at AWS: elsewhere a bucket's name is rarely a host."""
        client = await self._filesystem.set_session()
        if "amazonaws.com" in client.meta.endpoint_url or (client.meta.config.s3 or {}).get("addressing_style"):
            return client
        self._filesystem = _filesystem(addressing_style="path")
        return await self._filesystem.set_session()

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        if self._owner != os.getpid():  # clients and event loops do not survive a fork
            if self._filesystem is not None:
                _inherited.append((self._filesystem, self._connecting))
            self._filesystem, self._connecting, self._owner = _filesystem(), None, os.getpid()
        loop: asyncio.AbstractEventLoop = self._filesystem.loop
        return loop

    def _key(self, path: str) -> str:
        return f"{self._prefix}/{path}" if self._prefix else path

    def _info(self, found: dict[str, Any]) -> ObjectInfo:
        path = found["Key"].removeprefix(self._key(""))
        return ObjectInfo(path, found["Size"], found["LastModified"].timestamp(), found.get("ETag", "").strip('"'))


def split_url(url: str) -> tuple[str, str]:
    """Bucket and prefix. Raises StoreError on a URL without a bucket, or with `.` or `..` steps."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    if ":" in bucket:
        raise StoreError(f"store {url}: a bucket's name has no ':'; the endpoint comes from AWS_ENDPOINT_URL")
    if not bucket:
        raise StoreError(f"store {url}: the bucket is missing; write s3://BUCKET/PREFIX")
    steps = [step for step in prefix.split("/") if step]
    if {".", ".."} & set(steps):
        raise StoreError(f"store {url}: the prefix must not hold '.' or '..'")
    return bucket, "/".join(steps)


def _filesystem(**s3_settings: str) -> Any:
    import aiobotocore.session
    import s3fs

    config: dict[str, Any] = {
        "retries": {"total_max_attempts": 1, "mode": "standard"},
        "connect_timeout": CONNECT_TIMEOUT_S,
        "read_timeout": READ_TIMEOUT_S,
        "max_pool_connections": 2 * SMALL_AT_ONCE,
    }
    if s3_settings:
        config["s3"] = s3_settings
    session = aiobotocore.session.AioSession()
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_timestamp)
    return s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True, session=session, config_kwargs=config)


def _timestamp(value: Any) -> datetime:
    """botocore's own way takes two thirds of the time of a listing."""
    try:
        return datetime.fromisoformat(value)
    except (TypeError, ValueError):  # the form of HTTP headers
        parsed: datetime = parse_timestamp(value)
        return parsed


def _read_part(source: Path, offset: int, size: int) -> bytes:
    with source.open("rb") as stream:
        return os.pread(stream.fileno(), size, offset)

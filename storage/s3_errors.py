"""What an S3 error means: to be tried again, or to be told to the user, with what to do about it. Never a secret."""

import asyncio
import re
from typing import Any

import aiohttp
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError

from storage.errors import DamagedObject, MissingObject, StoreAway, StoreError

TRANSIENT_CODES = {
    "SlowDown",
    "InternalError",
    "InternalServerError",
    "ServiceUnavailable",
    "RequestTimeout",
    "Throttling",
    "ThrottlingException",
    "RequestLimitExceeded",
    "TooManyRequests",
    "OperationAborted",
    "ConditionalRequestConflict",
    # the request was altered on its way: the next one will not be
    "BadDigest",
    "IncompleteBody",
    "XAmzContentSHA256Mismatch",
    "XAmzContentChecksumMismatch",
}
MISSING_CODES = {"NoSuchKey", "404", "NotFound"}
PRECONDITION_CODES = {"PreconditionFailed", "412"}
TRANSIENT_TYPES = (
    boto.ConnectionError,  # refused, no such host
    boto.HTTPClientError,  # reset, timeout, broken body
    boto.FlexibleChecksumError,
    boto.IncompleteReadError,
    ResponseParserError,  # an answer that was altered or cut
    aiohttp.ClientError,
    asyncio.TimeoutError,
    ConnectionError,
)
MAY_NOT = (
    "these credentials may not do this; the store needs list, get, put and delete on the bucket, gc also to list and abort "
    "multipart uploads"
)
REMEDIES = {
    "InvalidAccessKeyId": "the server does not know the access key; check AWS_ACCESS_KEY_ID or AWS_PROFILE",
    "SignatureDoesNotMatch": "the secret does not fit the access key; check AWS_SECRET_ACCESS_KEY or AWS_PROFILE",
    "ExpiredToken": "the session token has expired; log in again",
    "InvalidToken": "the session token is not valid; check AWS_SESSION_TOKEN, or log in again",
    "AccessDenied": MAY_NOT,
    "403": MAY_NOT,
    "NoSuchBucket": "the bucket does not exist at this endpoint; create it, or check the name and AWS_ENDPOINT_URL",
    "RequestTimeTooSkewed": "this machine's clock and the server's differ; set the clock",
    "PermanentRedirect": "the bucket is in another region; set AWS_REGION to it",
    "AuthorizationHeaderMalformed": "the bucket is in another region; set AWS_REGION to it",
    "NotImplemented": "the server cannot do this; conditional writes (If-None-Match) are needed",
    "PreconditionFailed": "the object was replaced while it was read; run again",
    "412": "the object was replaced while it was read; run again",
    "QuotaExceeded": "the bucket is full; free some space or choose another store",
    "InsufficientStorage": "the server is full; free some space or choose another store",
    "507": "the server is full; free some space or choose another store",
}


def error_code(error: BaseException) -> str:
    """S3's code of an error, or the HTTP status where the answer had no body; empty for other errors."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, boto.ClientError) else ""


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a moment later."""
    if isinstance(error, boto.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return error_code(error) in TRANSIENT_CODES or (status >= 500 and status not in (501, 507)) or status == 429
    return isinstance(error, TRANSIENT_TYPES)


def explain(url: str, path: str, error: BaseException, tried: str = "") -> StoreError:
    """One line with the object's name, what was found and what to do."""
    if isinstance(error, StoreError):
        return error
    where = f"{url}: object {path or '(listing)'}"
    code = error_code(error)
    kind = StoreAway if is_transient(error) else StoreError
    if code in MISSING_CODES:
        return MissingObject(f"{where} is missing; run `nst run` again to make it anew")
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
        return StoreError(f"{where}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE")
    if isinstance(error, boto.ProfileNotFound):
        return StoreError(f"{where}: {error}; check AWS_PROFILE")
    if isinstance(error, boto.FlexibleChecksumError):
        return DamagedObject(f"{where} is damaged: its bytes do not match the checksum that the server keeps{tried}")
    if isinstance(error, boto.ConnectTimeoutError | boto.EndpointConnectionError):
        return StoreAway(f"{where}: the server cannot be reached{tried} ({_brief(error)}); check AWS_ENDPOINT_URL")
    if code:
        answer: Any = error.response  # type: ignore[attr-defined]
        remedy = REMEDIES.get(code, "the server may be overloaded" if is_transient(error) else "see the server's log")
        message = answer.get("Error", {}).get("Message", "")
        return kind(f"{where}: {code}{tried} ({message}); {remedy}")
    return kind(f"{where}: {_brief(error)}{tried}; check the network, AWS_ENDPOINT_URL and the server")


def _brief(error: BaseException) -> str:
    """Type and text of an error, without the query of a URL: it may be signed."""
    text = re.sub(r"\?[^\s\"']*", "", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__

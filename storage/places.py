"""Where objects lie: which backend a URL names, and which paths are those of a store."""

from urllib.parse import unquote

from storage.backend import Backend, refuse_credentials
from storage.errors import MissingObject, StoreError
from storage.local import LocalBackend


def open_backend(url: str) -> Backend:
    """The kind of store that a URL names. Raises StoreError on a URL that names none."""
    refuse_credentials(url, "store")
    scheme = url.partition("://")[0] if "://" in url else "file"
    if not url:
        raise StoreError("the store's URL is empty; give a folder, a file:// URL or an s3:// URL with --store")
    if scheme == "s3":
        from storage.s3 import S3Backend  # s3fs takes a second to load

        return S3Backend(url)
    if scheme == "file":
        return LocalBackend(url)
    raise StoreError(
        f"store {scheme}://...: scheme {scheme!r} is not supported; use a folder, a file:// or an s3:// URL"
    )


def outside(path: str) -> tuple[str, str]:
    """For an object outside the store its root and its path there; `("", path)` for one of the store."""
    scheme, separator, rest = path.partition("://")
    if not separator:
        return "", path
    host, _, name = rest.partition("/")
    return f"{scheme}://{host or '/'}", unquote(name) if scheme == "file" else name


def checked(path: str) -> str:
    """The path. Raises StoreError on one that leaves the store."""
    if ".." in path.split("/") or path.startswith("/"):
        raise StoreError(f"object path {path!r} leaves the store; paths are relative and without '..'")
    return path


def missing(store: str, path: str) -> MissingObject:
    """The error for an object that is not there."""
    if outside(path)[0]:
        return MissingObject(
            f"{path} is missing; it was registered in place: put it back, or set data.root (or data.unlabeled_root) to where "
            "it is now and run with --rerun unlabeled"
        )
    return MissingObject(f"{store}: object {path} is missing; `nst verify --all --discard` and `nst run` make it anew")

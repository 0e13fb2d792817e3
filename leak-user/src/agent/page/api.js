// Requests to the agent that served this page, with its token.

const KEY = "leaktrace.token";
const PATIENCE = 20_000;

// The token; `token(text)` keeps one for this tab, `token(null)` forgets it.
export function token(text) {
  if (text === null) sessionStorage.removeItem(KEY);
  else if (text !== undefined) sessionStorage.setItem(KEY, text);
  return sessionStorage.getItem(KEY);
}

export function get(path) {
  const text = token();
  return fetch(path, {
    headers: text === null ? {} : { Authorization: `Bearer ${text}` },
    cache: "no-store",
    credentials: "omit",
    redirect: "error",
    signal: AbortSignal.timeout(PATIENCE),
  });
}

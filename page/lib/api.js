// The way to the daemon: /api/v1 and its events. The token is kept for this tab alone (sessionStorage), goes out as a
// header, never in an address or a cookie.
const BASE = '/api/v1';
const TOKEN = 'postrider.token';

let token = null;
try { token = sessionStorage.getItem(TOKEN); } catch { /* a browser that forbids it: memory does */ }

export function setToken(value) {
  token = value;
  try {
    if (value) sessionStorage.setItem(TOKEN, value);
    else sessionStorage.removeItem(TOKEN);
  } catch { /* memory does */ }
}
export const hasToken = () => Boolean(token);

export class ApiError extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

const headers = (more) => (token ? { ...more, authorization: `Bearer ${token}` } : more);

async function refused(response) {
  const text = await response.text();
  let said = text.trim();
  try { said = JSON.parse(text).detail ?? said; } catch { /* it is plain text */ }
  return new ApiError(response.status, said || `the daemon answered ${response.status}`);
}

async function ask(method, path, body, signal) {
  const request = { method, signal, cache: 'no-store', credentials: 'omit', headers: headers({ accept: 'application/json' }) };
  if (body !== undefined) {
    request.headers['content-type'] = 'application/json';
    request.body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(BASE + path, request);
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new ApiError(0, 'no contact with the daemon');
  }
  if (!response.ok) throw await refused(response);
  return response.status === 204 ? null : response.json();
}

export const get = (path, signal) => ask('GET', path, undefined, signal);
export const post = (path, body = {}) => ask('POST', path, body);

// `?a=1&b=2` of what is set.
export function query(values) {
  const set = Object.entries(values).filter(([, value]) => value !== '' && value != null);
  return set.length ? `?${new URLSearchParams(set)}` : '';
}
export const part = encodeURIComponent;

// Reads server-sent events until they end. EventSource can't send a header, so that a token would have to be in the address.
export async function follow(path, onEvent, signal) {
  const response = await fetch(BASE + path, { signal, cache: 'no-store', credentials: 'omit', headers: headers({ accept: 'text/event-stream' }) });
  if (!response.ok) throw await refused(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = '';
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    let end;
    while ((end = buffer.search(/\r?\n\r?\n/)) >= 0) {
      const block = buffer.slice(0, end);
      buffer = buffer.slice(end).replace(/^\r?\n\r?\n/, '');
      let name = 'message';
      const data = [];
      for (const line of block.split(/\r?\n/)) {
        if (line.startsWith('event:')) name = line.slice(6).trim();
        else if (line.startsWith('data:')) data.push(line.slice(5).replace(/^ /, ''));
      }
      if (data.length) onEvent(name, JSON.parse(data.join('\n')));
    }
  }
}

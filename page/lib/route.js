// Where one is: `#/files/ID`, `#/dead?destination=crm`. In the address after `#`, so that it never reaches a log.
import { useEffect, useState } from '../vendor/preact.js';

export function here() {
  const [path, search = ''] = location.hash.replace(/^#\/?/, '').split('?');
  const [view = '', ...rest] = path.split('/');
  let arg = rest.join('/');
  try { arg = decodeURIComponent(arg); } catch { /* somebody typed a lone % */ }
  return { view: view || 'now', arg, values: Object.fromEntries(new URLSearchParams(search)) };
}

export function to(view, arg, values = {}) {
  const set = Object.entries(values).filter(([, value]) => value);
  return `#/${view}${arg ? `/${encodeURIComponent(arg)}` : ''}${set.length ? `?${new URLSearchParams(set)}` : ''}`;
}

export function useRoute() {
  const [route, setRoute] = useState(here);
  useEffect(() => {
    const moved = () => setRoute(here());
    addEventListener('hashchange', moved);
    return () => removeEventListener('hashchange', moved);
  }, []);
  return route;
}

// What an operator can order. Each verb says first what it does, how long that takes and what can't be undone.
import { part, post } from './api.js';
import { Confirm, openDialog } from './dialog.js';
import { by, clock, count, duration, num, plain } from './format.js';
import { html } from '../vendor/preact.js';
import { mayOperate, now, state } from './store.js';

const IN_AUDIT = ['ok', '', 'It is in the audit.'];
const ask = (props) => openDialog(html`<${Confirm} ...${props} />`);
// The daemon's own words for what it did.
const said = (answer) => `${plain(answer.text)}${answer.changed ? '. In the audit.' : '.'}`;
const order = (path, body) => async () => said(await post(path, body));
const bold = (text) => html`<b>${text}</b>`;
const rateOf = (name) => {
  const destination = state.destinations.find((it) => it.name === name);
  return destination?.rate_per_s ?? destination?.sent_per_s ?? null;
};

export const operable = () => mayOperate();
// For a button's `title` where the token allows to look alone.
export const why = () => (mayOperate() ? undefined : state.session?.role === 'view' ? 'This token may look, not operate.' : 'No contact with the daemon.');

export function hold(file) {
  const points = [['pause', 'retry', html`Within a second ${bold('nothing more of it is sent')}. Requests that are in flight still end.`]];
  if (file.latest) points.push(['clock', '', html`It must go on by ${bold(clock(file.latest, now()))} to be done by ${by(file.finish_by, now())}.`]);
  else if (file.done_at) points.push(['clock', '', `Each minute of hold moves ${by(file.done_at, now())} by a minute.`]);
  ask({ title: `Hold ${plain(file.name)}?`, points: [...points, IN_AUDIT], verb: 'Hold', run: order(`/files/${file.id}/hold`) });
}

export function release(file) {
  const rates = file.to.map(rateOf).filter((rate) => rate > 0);
  const points = [['go', 'sent', html`${bold(count(file.open, 'message'))} of it go to ${file.to.join(', ')}, beside what goes there now.`]];
  if (file.reason) points.push(['warn', 'retry', html`It is held because of this: <q>${plain(file.reason)}</q>. Releasing it doesn’t change that.`]);
  if (rates.length) points.push(['clock', '', `At ${num(Math.min(...rates))}/s that takes ${duration(file.open / Math.min(...rates))}.`]);
  ask({ title: `Release ${plain(file.name)}?`, points: [...points, IN_AUDIT], verb: 'Release', run: order(`/files/${file.id}/release`) });
}

export function cancel(file) {
  ask({
    title: `Cancel ${plain(file.name)}?`, lead: 'This can’t be undone. To stop for a while, hold it.', bad: true, verb: `Cancel ${num(file.open)}`,
    points: [
      ['dead', 'dead', html`${bold(`${count(file.open, 'message is', 'messages are')} never sent.`)} ${file.rows_final ? '' : 'So are the rows that are not read yet. '}They become cancelled, and the file balances with them.`],
      ['sent', 'sent', `${num(file.sent)} are sent already and stay so. Requests that are in flight still end.`], IN_AUDIT,
    ],
    field: { label: 'Type the file’s name to cancel it', ok: (value) => value === plain(file.name) },
    run: order(`/files/${file.id}/cancel`),
  });
}

export function priority(file, value) {
  ask({ title: `Send ${plain(file.name)} as ${value}?`, verb: `Set ${value}`, run: order(`/files/${file.id}/priority`, { priority: value }),
    points: [['go', 'sent', 'Of 21 messages to a destination, 16 are urgent, 4 normal and 1 bulk, where all three wait. Files of one priority share evenly.'], IN_AUDIT] });
}

export function pause(destination) {
  ask({ title: `Pause ${destination.name}?`, verb: 'Pause', field: { label: 'Why (others will read it)', value: '', ok: () => true },
    points: [['pause', 'retry', html`Its ${bold(count(destination.open, 'open message'))} wait. None is given up.`], ['go', 'sent', 'Other destinations go on.'], IN_AUDIT],
    run: async (reason) => said(await post(`/destinations/${part(destination.name)}/pause`, reason.trim() ? { reason: reason.trim() } : {})) });
}

export function resume(destination) {
  const rate = rateOf(destination.name);
  ask({ title: `Resume ${destination.name}?`, verb: 'Resume', run: order(`/destinations/${part(destination.name)}/resume`),
    points: [['go', 'sent', html`${bold(count(destination.open, 'open message'))} go to it.`], ...(rate > 0 ? [['clock', '', `At ${num(rate)}/s that takes ${duration(destination.open / rate)}.`]] : []),
      ...(destination.reason ? [['warn', 'retry', html`It stands still because of this: <q>${plain(destination.reason)}</q>.`]] : []), IN_AUDIT] });
}

const isCount = (value) => /^[1-9]\d{0,7}$/.test(value.trim());
export function rate(destination) {
  ask({ title: `Rate of ${destination.name}`, lead: 'Holds within a second and survives restarts. “default” goes back to the configuration.', verb: 'Set rate',
    field: { label: 'rate_per_s', value: destination.rate_per_s ?? 'default', mode: 'numeric', ok: (value) => value === 'default' || isCount(String(value)) },
    run: async (value) => said(await post(`/destinations/${part(destination.name)}/rate`, { rate_per_s: value === 'default' ? null : Number(value) })) });
}

export function concurrency(destination) {
  ask({ title: `Concurrency of ${destination.name}`, lead: '“auto” finds what the receiver can bear; a number fixes it; “default” goes back to the configuration.', verb: 'Set concurrency',
    field: { label: 'concurrency', value: destination.concurrency ?? 'default', ok: (value) => ['auto', 'default'].includes(value) || isCount(String(value)) },
    run: async (value) => said(await post(`/destinations/${part(destination.name)}/concurrency`, { concurrency: value === 'default' ? null : value === 'auto' ? value : Number(value) })) });
}

// Of everything that matches, which takes several calls where it is much.
export function redrive(filter, words, { total, cut, groups }, done) {
  const at = new Map();
  for (const group of groups) at.set(group.destination, (at.get(group.destination) ?? 0) + group.messages);
  const takes = [...at].map(([name, messages]) => [name, messages, rateOf(name)]);
  const statuses = [...new Set(groups.map((group) => (group.status ? `${group.status}` : group.reason)))];
  const atLeast = cut ? 'at least ' : '';
  ask({
    title: `Redrive ${atLeast}${count(total, 'message')}?`, lead: words, verb: `Redrive ${atLeast}${num(total)}`,
    points: [
      ['go', 'sent', html`${bold(`${count(total, 'request')} go to ${[...at.keys()].join(', ')}`)}, with the same ids and the same bodies. A receiver that deduplicates by webhook-id takes none twice.`],
      ...takes.filter(([, , rate]) => rate > 0).map(([name, messages, rate]) => ['clock', '', `At ${name} that takes about ${duration(messages / rate)} at ${num(rate)}/s, beside what goes there now.`]),
      ['warn', 'retry', `Their last answers were ${statuses.slice(0, 4).map(plain).join(', ')}${statuses.length > 4 ? ` and ${statuses.length - 4} others` : ''}. If nothing has changed there, they come back.`],
      ['retry', 'retry', 'Attempts are counted anew. It is in the audit, with this filter.'],
    ],
    run: async (_, progress) => {
      const body = Object.keys(filter).length ? { ...filter } : { all: true };
      if (body.status) body.status = Number(body.status);
      let redriven = 0;
      for (;;) {
        const answer = await post('/dead/redrive', body);
        redriven += answer.redriven;
        progress(`${num(redriven)} of ${atLeast}${num(total)} redriven…`);
        // A call that found nothing ends it, whatever it says of more: a loop must have an end.
        if (!answer.more || answer.redriven === 0) break;
      }
      done();
      return `${count(redriven, 'message')} redriven. In the audit.`;
    },
  });
}

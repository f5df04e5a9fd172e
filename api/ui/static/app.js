// What scripts add to pages that work without them: live updates, dialogues, keys, selection, themes. Loaded before the
// page is drawn, so that the theme is right at once; all else begins when the page is there.
'use strict';

(() => {
  const REFRESH_EVERY = 1000;   // ms between two readings of the page at least
  const LOST_AFTER = 10000;     // ms without a stream until polling begins
  const POLL_EVERY = 5000;
  const FLOOR_EVERY = 5000;     // also without signals: new jobs, heartbeats and places in the line give none
  const ANNOUNCE_EVERY = 5000;
  const SAID_FOR = 10000;
  const kept = {
    get(name) { try { return localStorage.getItem('jobqueue.' + name); } catch { return null; } },
    set(name, value) { try { localStorage.setItem('jobqueue.' + name, value); } catch { /* private window */ } },
  };
  const $ = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const main = () => $('#main');
  // -- Theme ---------------------------------------------------------------------------------------------------------

  const THEMES = ['system', 'light', 'dark'];

  function setTheme(name) {
    if (name === 'light' || name === 'dark') document.documentElement.dataset.theme = name;
    else delete document.documentElement.dataset.theme;
    const button = $('#theme-switch');
    if (button) { button.textContent = 'Theme'; button.title = 'Now: ' + (name || 'system'); }
  }
  function nextTheme() {
    const name = THEMES[(THEMES.indexOf(kept.get('theme') || 'system') + 1) % THEMES.length];
    kept.set('theme', name);
    setTheme(name);
  }
  setTheme(kept.get('theme'));

  // -- The page, read again ------------------------------------------------------------------------------------------

  let refreshing = false, wanted = false, lastRefresh = Date.now(), timer = null;

  function parse(text) { return new DOMParser().parseFromString(text, 'text/html'); }

  function isLogin(response) {
    return response.status === 401 || (response.redirected && new URL(response.url).pathname.endsWith('/ui/login'));
  }

  async function show(doc, { force = false } = {}) {
    const fresh = doc.querySelector('#main');
    if (!fresh) return;
    if (!force) holdRows(fresh);
    keepSaid(fresh);
    for (const attribute of [...main().attributes]) {
      if (attribute.name.startsWith('data-') && !fresh.hasAttribute(attribute.name)) main().removeAttribute(attribute.name);
    }
    for (const attribute of fresh.attributes) main().setAttribute(attribute.name, attribute.value);
    const ticked = new Set(all('input[type=checkbox][name=id]:checked', main()).map((box) => box.value));
    await htmx.swap({ text: fresh.innerHTML, target: main(), swap: 'innerMorph', sourceElement: main() });
    const title = doc.querySelector('title');
    if (title) document.title = title.textContent;
    for (const box of all('input[type=checkbox][name=id]', main())) box.checked = ticked.has(box.value);
    dress();
  }

  // What was done stays readable for a while, also when the page is read again.
  let saidUntil = 0;
  function keepSaid(fresh) {
    if (fresh.querySelector('.said')) { saidUntil = Date.now() + SAID_FOR; return; }
    const said = $('.said', main());
    if (said && !saidUntil) saidUntil = Date.now() + SAID_FOR;
    if (said && Date.now() < saidUntil) fresh.prepend(said.cloneNode(true));
    else saidUntil = 0;
  }

  async function refresh({ force = false } = {}) {
    if (refreshing) { wanted = true; return; }
    refreshing = true; wanted = false;
    const began = Date.now();
    try {
      const response = await fetch(location.href, { headers: { 'HX-Request': 'true' }, cache: 'no-store' });
      if (isLogin(response)) { location.reload(); return; }
      if (response.ok) {
        await show(parse(await response.text()), { force });
        lastRefresh = Date.now();
        problem(null);
      } else {
        problem(`The page could not be read again (${response.status}); what you see is older.`);
      }
    } catch {
      if (live.connected) problem('The page could not be read again; what you see is older.');
    } finally {
      refreshing = false;
      lastTry = Date.now();
      took = lastTry - began;
      if (wanted) soon();
    }
  }
  let lastTry = 0, took = 0;

  function soon() {
    if (timer || !live.wanted()) return;
    // A page that takes long to make is read again less often: a fifth of the time at most.
    const rest = Math.max(REFRESH_EVERY, 4 * took);
    timer = setTimeout(() => { timer = null; refresh(); }, Math.max(0, lastTry + rest - Date.now()));
  }

  function problem(text) {
    const place = $('#problem');
    if (!place) return;
    place.hidden = !text;
    place.textContent = text || '';
  }

  // Rows are not pushed away under a selection, a pointer or the keyboard's focus: those that are shown stay where they
  // are, with their new state, and new ones wait behind a button.
  let pointerInRows = false;
  function holdRows(fresh) {
    const body = $('tbody[data-rows]'), next = fresh.querySelector('tbody[data-rows]');
    if (!body || !next) return;
    const held = pointerInRows || body.contains(document.activeElement) || body.querySelector('input[name=id]:checked');
    if (!held) return;
    const byId = new Map([...next.rows].map((row) => [row.id, row]));
    const rows = [...body.rows].map((row) => {
      const found = byId.get(row.id);
      byId.delete(row.id);
      if (found) return found;
      const copy = row.cloneNode(true);
      copy.classList.add('left');
      return copy;
    });
    next.replaceChildren(...rows);
    const pill = fresh.querySelector('[data-new-rows]'), count = [...byId.keys()].filter((id) => id).length;
    if (pill && count) {
      pill.hidden = false;
      pill.textContent = `${count} new – show`;
    }
  }

  // -- Live ----------------------------------------------------------------------------------------------------------

  const live = {
    connected: false,
    lostAt: Date.now(),
    polledAt: 0,
    element: null,
    paused: () => kept.get('live') === 'off',
    wanted: () => main() && main().hasAttribute('data-live') && !live.paused() && !document.hidden,

    start() {
      if (live.element || live.paused() || !document.body.dataset.live || !main().hasAttribute('data-live')) return;
      const element = document.createElement('div');
      element.id = 'stream';
      element.hidden = true;
      element.setAttribute('hx-sse:connect', document.body.dataset.live);
      element.addEventListener('htmx:sse:after:connection', (event) => live.arrived(event));
      for (const name of ['htmx:sse:error', 'htmx:sse:close', 'htmx:error']) element.addEventListener(name, () => live.lost());
      element.addEventListener('htmx:sse:before:connection', (event) => { if (event.detail.connection.attempt > 0) live.lost(); });
      element.addEventListener('jobs', (event) => live.heard(event.detail.data));
      for (const name of ['summary', 'resync']) element.addEventListener(name, () => { if (!main().dataset.job) soon(); });
      element.addEventListener('resync', soon);
      document.body.append(element);
      live.element = element;
      htmx.process(element);
    },
    stop() {
      if (!live.element) return;
      const element = live.element;
      live.element = null;
      live.connected = false;
      live.lostAt = Date.now();
      htmx.swap({ text: '', target: element, swap: 'delete', sourceElement: document.body });
    },
    arrived(event) {
      if (event.detail.connection.status !== 200) return;
      live.connected = true;
      $('#offline').hidden = true;
    },
    lost() {
      if (live.connected) live.lostAt = Date.now();
      live.connected = false;
    },
    heard(data) {
      let jobs = [];
      try { jobs = JSON.parse(data); } catch { return; }
      announce(jobs);
      const only = main().dataset.job;
      if (!only || jobs.some((job) => job.id === only)) soon();
    },
    tick() {
      const now = Date.now();
      const label = $('#updated');
      if (label && main().hasAttribute('data-live')) {
        label.hidden = false;
        label.textContent = live.paused() ? 'updates paused' : `updated ${Math.round((now - lastRefresh) / 1000)} s ago`;
      }
      if (!live.wanted()) return;
      const lost = !live.connected && now - live.lostAt >= LOST_AFTER;
      $('#offline').hidden = !lost;
      if (lost && now - live.polledAt >= POLL_EVERY) {
        live.polledAt = now;
        refresh();
        // A stream whose first request failed does not come back by itself.
        if (live.element && !live.element._htmx?.sse) live.stop();
        live.start();
      } else if (live.connected && now - lastTry >= FLOOR_EVERY && now - lastRefresh >= FLOOR_EVERY) {
        refresh();
      }
    },
    toggle() {
      kept.set('live', live.paused() ? 'on' : 'off');
      live.showSwitch();
      if (live.paused()) { live.stop(); $('#offline').hidden = true; } else { live.lostAt = Date.now(); live.start(); refresh(); }
    },
    showSwitch() {
      const button = $('#live-switch');
      if (!button) return;
      button.hidden = !main().hasAttribute('data-live');
      button.setAttribute('aria-pressed', String(live.paused()));
      button.textContent = live.paused() ? 'Resume updates' : 'Pause updates';
    },
  };

  // At most every five seconds a line for those who hear the page.
  const unsaid = { failed: new Set(), completed: new Set() };
  let saidAt = 0;
  function announce(jobs) {
    for (const job of jobs) if (unsaid[job.status]) unsaid[job.status].add(job.id);
    say();
  }

  function say() {
    const wait = saidAt + ANNOUNCE_EVERY - Date.now();
    if (wait > 0) { if (!say.timer) say.timer = setTimeout(() => { say.timer = null; say(); }, wait); return; }
    const parts = Object.entries(unsaid).filter(([, ids]) => ids.size)
      .map(([status, ids]) => `${ids.size} ${ids.size === 1 ? 'job' : 'jobs'} ${status}`);
    if (!parts.length) return;
    saidAt = Date.now();
    $('#announcements').textContent = parts.join(', ');
    for (const ids of Object.values(unsaid)) ids.clear();
  }

  // -- Dialogues -----------------------------------------------------------------------------------------------------

  let opener = null;

  async function openDialog(link) {
    opener = { element: link, id: link.id, row: rows().indexOf(link.closest('tr')) };
    const response = await fetch(link.href, { headers: { 'HX-Request': 'true' }, cache: 'no-store' });
    if (isLogin(response)) location.reload();
    else await fillDialog(await response.text(), link.href);
  }

  async function fillDialog(text, address) {
    const doc = parse(text), part = doc.querySelector('[data-confirm]'), dialog = $('#dialog');
    if (!part) { sayInDialog(dialog, doc); return; }
    const back = part.querySelector('input[name=back]');
    if (back && back.value === '') back.value = here();
    dialog.replaceChildren(document.adoptNode(part));
    dialog.dataset.address = address;
    dress(dialog);
    if (!dialog.open) dialog.showModal();
    const first = dialog.querySelector('[aria-invalid=true], [autofocus], input:not([type=hidden]), button');
    if (first) first.focus();
  }

  // An error page instead of a question.
  function sayInDialog(dialog, doc) {
    const close = document.createElement('button');
    close.textContent = 'Close';
    close.dataset.close = '';
    const found = all('#main > h1, #main > p:not(:last-child)', doc).map((element) => document.adoptNode(element));
    if (found[0]) found[0].id = 'confirm-title';
    dialog.replaceChildren(...found, close);
    if (!dialog.open) dialog.showModal();
    close.focus();
  }

  async function send(form, submitter) {
    const data = new FormData(form, submitter), buttons = all('button', form);
    for (const button of buttons) button.disabled = true;
    // Not form.action: a field of this name stands before it.
    const address = form.getAttribute('action');
    try {
      const response = await fetch(address, {
        method: 'POST', body: new URLSearchParams(data), headers: { 'HX-Request': 'true' },
      });
      if (isLogin(response)) { location.reload(); return; }
      const text = await response.text(), doc = parse(text);
      if (doc.querySelector('[data-confirm]') || !response.ok) { await fillDialog(text, address); return; }
      // The dialogue's own way back would lead to a row that is about to be replaced.
      const from = opener;
      opener = null;
      $('#dialog').close();
      if (response.redirected) history.replaceState(null, '', response.url);
      for (const box of all('input[name=id]:checked', main())) box.checked = false;
      await show(doc, { force: true });
      lastRefresh = Date.now();
      const said = $('.said', main());
      if (said) $('#announcements').textContent = said.textContent;
      opener = from;
      focusBack();
      tidyAddress();
    } catch {
      const place = form.querySelector('.banner.error') || form.insertAdjacentElement('afterbegin', document.createElement('p'));
      place.className = 'banner error';
      place.textContent = 'The server could not be reached. Nothing is known of what was done: look, and try again.';
    } finally {
      for (const button of buttons) button.disabled = false;
    }
  }

  function focusBack() {
    if (!opener) return;
    const found = (opener.element.isConnected && opener.element)
      || (opener.id && document.getElementById(opener.id))
      || (opener.row >= 0 && rows().length && $('a', rows()[Math.min(opener.row, rows().length - 1)]))
      || $('.actions a.button, .actions button:not(:disabled)') || main();
    found.focus();
    opener = null;
  }

  const here = () => location.pathname.slice(document.body.dataset.root.length - 1) + location.search;

  function tidyAddress() {
    const url = new URL(location.href);
    if (!url.searchParams.has('done')) return;
    url.searchParams.delete('done');
    history.replaceState(null, '', url);
  }

  // -- Rows and keys -------------------------------------------------------------------------------------------------

  const rows = () => all('tbody[data-rows] tr[id]');
  const currentRow = () => document.activeElement && document.activeElement.closest('tbody[data-rows] tr[id]');

  function moveRow(step) {
    const found = rows();
    if (!found.length) return;
    const at = found.indexOf(currentRow());
    const next = found[at < 0 ? (step > 0 ? 0 : found.length - 1) : Math.min(Math.max(at + step, 0), found.length - 1)];
    const link = next.querySelector('a');
    if (link) { link.focus(); next.scrollIntoView({ block: 'nearest' }); }
  }

  function act(key) {
    const row = currentRow();
    const link = $(`a[data-key="${key}"]`, row || main());
    if (link) link.click();
  }

  let went = 0;
  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    if (kept.get('keys') === 'off' || $('dialog[open]')) return;
    if (event.target.closest('input:not([type=checkbox]), textarea, select, [contenteditable]')) return;
    const key = event.key;
    if (Date.now() - went < 1500) {
      went = 0;
      const link = $(`a[data-go="${CSS.escape(key)}"]`);
      if (link) { event.preventDefault(); link.click(); return; }
    }
    const does = {
      g: () => { went = Date.now(); },
      '/': () => { const box = $('input[type=search]'); if (box) { box.focus(); box.select(); } },
      j: () => moveRow(1),
      k: () => moveRow(-1),
      x: () => { const box = currentRow() && currentRow().querySelector('input[name=id]'); if (box) box.click(); },
      r: () => act('r'), c: () => act('c'), s: () => act('s'),
      p: () => live.toggle(),
      t: nextTheme,
      '?': openHelp,
    }[key];
    if (!does) return;
    event.preventDefault();
    does();
  }

  function openHelp() {
    $('#keys-on').checked = kept.get('keys') !== 'off';
    $('#help').showModal();
  }

  // -- Selection -----------------------------------------------------------------------------------------------------

  function countSelected() {
    const boxes = all('input[type=checkbox][name=id]', main());
    const count = boxes.filter((box) => box.checked).length;
    const allMatching = Boolean($('input[name=everything]:checked', main()));
    const everything = $('#select-all');
    if (everything) {
      everything.checked = count > 0 && count === boxes.length;
      everything.indeterminate = count > 0 && count < boxes.length;
    }
    for (const place of all('[data-selected]')) place.textContent = count ? `${count} selected` : 'None selected';
    for (const button of all('[data-needs-selection]')) button.disabled = !count && !allMatching;
  }

  // -- Small things --------------------------------------------------------------------------------------------------

  function span(seconds) {
    for (const [size, name, smaller, unit] of [[86400, 'd', 3600, 'h'], [3600, 'h', 60, 'min'], [60, 'min', 1, 's']]) {
      if (seconds >= size) {
        const rest = Math.floor(seconds % size / smaller);
        return `${Math.floor(seconds / size)} ${name}` + (rest ? ` ${rest} ${unit}` : '');
      }
    }
    return `${seconds} s`;
  }
  function tellTimes(root = document) {
    for (const element of all('time[datetime]', root)) {
      const at = new Date(element.dateTime), seconds = Math.round((Date.now() - at) / 1000);
      const text = seconds >= 0 ? `${span(seconds)} ago` : `in ${span(-seconds)}`;
      if (element.textContent !== text) element.textContent = text;
      const title = `${at.toLocaleString()} · ${at.toISOString().slice(0, 19).replace('T', ' ')} UTC`;
      if (element.title !== title) element.title = title;
    }
  }

  async function copy(button) {
    const text = button.dataset.copy;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // On plain HTTP there is no clipboard.
      const box = document.createElement('textarea');
      box.value = text;
      (button.closest('dialog') || document.body).append(box);
      box.select();
      document.execCommand('copy');
      box.remove();
      button.focus();
    }
    $('#announcements').textContent = 'Copied.';
    button.classList.add('copied');
    setTimeout(() => button.classList.remove('copied'), 1500);
  }

  function dress(root = document) {
    for (const element of all('[data-copy][hidden], [data-script][hidden]', root)) element.hidden = false;
    tellTimes(root);
    countSelected();
    live.showSwitch();
  }

  // -- Begin ---------------------------------------------------------------------------------------------------------

  document.addEventListener('DOMContentLoaded', () => {
    setTheme(kept.get('theme'));
    for (const id of ['theme-switch', 'help-switch']) { const button = $('#' + id); if (button) button.hidden = false; }
    tidyAddress();
    dress();

    document.addEventListener('click', (event) => {
      const link = event.target.closest('a[data-dialog]');
      if (link && !event.ctrlKey && !event.metaKey && !event.shiftKey && event.button === 0) {
        event.preventDefault();
        openDialog(link).catch(() => { location.href = link.href; });
        return;
      }
      if (event.target.closest('[data-close]') && $('#dialog')?.open) { event.preventDefault(); $('#dialog').close(); return; }
      const copied = event.target.closest('[data-copy]');
      if (copied) { copy(copied); return; }
      if (event.target.closest('[data-new-rows]')) refresh({ force: true });
    });
    document.addEventListener('submit', (event) => {
      const form = event.target;
      if (form.closest('#dialog')) { event.preventDefault(); send(form, event.submitter); return; }
      if (form.hasAttribute('data-dialog-form')) {
        // A form whose answer is a question: shown as a dialogue too.
        event.preventDefault();
        opener = { element: event.submitter || form, row: -1 };
        const data = new URLSearchParams(new FormData(form, event.submitter));
        const isPost = form.method === 'post';
        const address = form.getAttribute('action'), url = isPost ? address : `${address}?${data}`;
        fetch(url, { method: form.method, body: isPost ? data : undefined, headers: { 'HX-Request': 'true' } })
          .then(async (response) => (isLogin(response) ? location.reload() : fillDialog(await response.text(), url)));
      }
    });
    document.addEventListener('change', (event) => {
      if (event.target.id === 'select-all') {
        for (const box of all('input[type=checkbox][name=id]', main())) box.checked = event.target.checked;
      }
      if (event.target.id === 'keys-on') kept.set('keys', event.target.checked ? 'on' : 'off');
      countSelected();
    });
    document.addEventListener('keydown', onKey);
    document.addEventListener('pointerover', (event) => { pointerInRows = Boolean(event.target.closest?.('tbody[data-rows]')); });
    document.documentElement.addEventListener('pointerleave', () => { pointerInRows = false; });
    $('#live-switch')?.addEventListener('click', live.toggle);
    $('#theme-switch')?.addEventListener('click', nextTheme);
    $('#help-switch')?.addEventListener('click', openHelp);
    // The event comes after the dialogue has closed: by then somebody may have gone elsewhere by a key.
    $('#dialog')?.addEventListener('close', () => { if (document.activeElement === document.body) focusBack(); else opener = null; });
    document.addEventListener('visibilitychange', () => {
      if (!document.hidden && live.wanted()) { live.lostAt = Date.now(); refresh(); }
    });
    // After htmx has looked at the page by itself: it would connect the same element a second time.
    setTimeout(live.start);
    setInterval(live.tick, 1000);
    setInterval(() => { if (!document.hidden) tellTimes(); }, 5000);
  });
})();
